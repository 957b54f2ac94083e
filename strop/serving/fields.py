"""The fields of a JSON body, each read once, with the error that its sender understands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form. Its message goes to the client: no paths, no internals."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. NaN and Infinity, which JSON lacks, and half surrogate pairs are refused."""

    def refuse(constant: str) -> Any:
        raise ApiError(400, f"{constant} is no JSON")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


class Fields:
    """The fields of one JSON object; null counts as absent, as OpenAI's clients mean it.

    Example:
        fields = Fields(body)
        n = fields.integer("n", 1, low=1, high=64)
        fields.finish()
    """

    def __init__(self, body: Mapping[str, Any], *, where: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = where

    def error(self, name: str, problem: str, *, code: str | None = None) -> ApiError:
        return ApiError(400, f"{self._where}{name} {problem}", param=f"{self._where}{name}", code=code)

    def take(self, name: str) -> Any:
        """The value, or None."""
        return self._left.pop(name, None)

    def integer(self, name: str, default: int | None, *, low: int, high: int) -> Any:
        value = self._left.pop(name, default)
        if value is None:
            return None
        if not _is_integer(value) or not low <= value <= high:
            raise self.error(name, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, *, low: float, high: float, is_open: bool = False) -> float:
        """is_open leaves `low` itself out."""
        value = self._left.pop(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float_of(value))
        if not is_number or not low <= value <= high or (is_open and value == low):
            raise self.error(name, f"must be a number {'above' if is_open else 'from'} {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._left.pop(name, default)
        if not isinstance(value, str):
            raise self.error(name, "must be text" + ("" if name in self._left or default else ", and is needed"))
        return value

    def items(self, name: str, is_right: Callable[[Any], bool], kind: str, *, most: int) -> list[Any]:
        """A list of at most so many values, each of which is_right."""
        value = self._left.pop(name, [])
        if not isinstance(value, list) or len(value) > most or not all(map(is_right, value)):
            raise self.error(name, f"must be a list of at most {most} {kind}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        value = self._left.pop(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change no answer."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Refuse whatever nobody has read: a field that cannot be honoured must not look as if it were."""
        if self._left:
            name = min(self._left)
            raise self.error(name, "is not supported here", code="unsupported_parameter")


def float_of(value: int | float) -> float:
    """As float, infinite for whole numbers too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
