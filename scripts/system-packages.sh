#!/usr/bin/env bash
# Installs the system packages that tests use and that are not there yet, where apt-get may be used without asking:
# as root, or with sudo that wants no password. Says what it cannot install, and never fails and never waits for long:
# tests that need a missing program skip with a sentence.
set -u

# program:package, and what it is for
WANTED=(
  "chromium:chromium:tests/test_lab.py drives JupyterLab in it"
  "initdb:postgresql:tests/test_store.py starts a server of its own"
  "promtool:prometheus:tests/test_deploy_files.py has the scrape configuration checked by it"
)
LIMIT_S=${LIMIT_S:-300} # for each call of apt-get

missing=()
for entry in "${WANTED[@]}"; do
  IFS=: read -r program package purpose <<<"$entry"
  command -v "$program" >/dev/null 2>&1 || compgen -G "/usr/lib/postgresql/*/bin/$program" >/dev/null || missing+=("$package")
done
# Figures in Korean documents have Korean labels where a font has the letters, and English ones elsewhere.
fc-list :lang=ko 2>/dev/null | grep -q . || compgen -G "/usr/share/fonts/*/*/Nanum*" >/dev/null || missing+=(fonts-nanum)
[ ${#missing[@]} -eq 0 ] && exit 0

cannot() {
  echo "system-packages: not installed: ${missing[*]} ($1); tests that need them skip"
  exit 0
}

command -v apt-get >/dev/null 2>&1 || cannot "there is no apt-get here"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  sudo -n true >/dev/null 2>&1 || cannot "neither root nor sudo without a password; apt-get install ${missing[*]} would do it"
  as_root=(sudo -n)
fi

get() { # quiet, never asking, given up after a while, also while another apt-get holds the lock
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive timeout --kill-after=10 "$LIMIT_S" \
    apt-get -qq -y -o DPkg::Lock::Timeout=60 -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 \
    "$@" </dev/null >/dev/null 2>&1
}

echo "system-packages: installing ${missing[*]}"
get install --no-install-recommends "${missing[@]}" || { get update && get install --no-install-recommends "${missing[@]}"; } || cannot "apt-get could not"
