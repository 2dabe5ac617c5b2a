"""An open-loop load from the command line; what it does is in amhs.load.

`python bench/load.py URL --body FILE --key KEY --rate 1000 --seconds 10` prints one JSON line. Run it in a process of its own.
"""

from amhs.load import main

if __name__ == "__main__":
    main()
