"""The forecasting service: `bentoml serve service:Amhs`. What it answers is in amhs.serve, how it is asked in amhs.api."""

import os
from pathlib import Path

import bentoml

from amhs.api import create_app

app = create_app(assets=Path(bentoml.__file__).parent / "_internal/server/static_content")


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
        return app.state.front is not None and app.state.front.ready
