"""The forecasting service: `bentoml serve service:Amhs`. What it answers is in amhs.serve, how it is asked in amhs.api."""

import os
from pathlib import Path

import bentoml

from amhs.door import Direct, Later

app = Later("amhs.api:create_app", assets=Path(bentoml.__file__).parent / "_internal/server/static_content")


@bentoml.service(
    name="amhs",
    workers=int(os.environ.get("AMHS_WORKERS", 2)),
    traffic={"timeout": 30},
    # each of these layers would cost more than a forecast (params/serving.yaml says what is measured instead)
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},
    metrics={"enabled": True},
)
@bentoml.asgi_app(app, path="/v1")
class Amhs:
    def __is_ready__(self) -> bool:
        "Ready when the packages are loaded and their examples were answered."
        return app.app is not None and app.app.state.front is not None and app.app.state.front.ready


class _BehindTheDoor(type(Amhs)):
    """BentoML puts middleware of a service behind its own; requests with a fixed path must come before it.

    Its timer and its counters of a request cost as much as the forecast (one worker: 805 requests a second with them, 1,223 without).
    """

    __slots__ = ()

    def to_asgi(self, is_main: bool = True):
        return Direct(super().to_asgi(is_main), app, "/v1")


Amhs.__class__ = _BehindTheDoor
