"""Frozen checkpoints behind an OpenAI-compatible HTTP interface, and a page to talk with them."""

from strop.serving.app import build_app
from strop.serving.limits import Limits
from strop.serving.models import ServedModel, serve_model
from strop.serving.worker import Worker

__all__ = ["Limits", "ServedModel", "Worker", "build_app", "serve_model"]
