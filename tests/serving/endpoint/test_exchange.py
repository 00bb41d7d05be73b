"""What a request is answered that goes no further: which error, and when to come back."""

from __future__ import annotations

import json

import pytest

from gem_vllm.serving.endpoint import metrics
from gem_vllm.serving.endpoint.exchange import Refused, come_back


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (408, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
        (504, "server_error"),
    ],
)
def test_an_error_is_of_the_type_that_its_status_has(status: int, kind: str) -> None:
    answer = Refused(status, "No.", {"WWW-Authenticate": "Bearer"}).response()
    assert answer.status_code == status
    assert answer.headers["www-authenticate"] == "Bearer"
    error = {"message": "No.", "type": kind, "param": None, "code": status}
    assert json.loads(bytes(answer.body)) == {"error": error}


@pytest.mark.parametrize("status", [429, 503, 504])
@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        ([], "1"),
        ([0.2], "1"),
        ([1.0], "1"),
        ([1.1], "2"),
        ([2.0, 30.0], "4"),  # 3.4 is the moving average
        ([2.0, 0.1], "2"),
        ([400.0], "30"),
    ],
)
def test_by_when_to_come_back_as_much_is_done_as_is_being_done(
    seconds: list[float], header: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_seconds", 0.0)
    for each in seconds:
        metrics._note_seconds(each)
    answer = come_back(status, "Later.").response()
    assert (answer.status_code, answer.headers["retry-after"]) == (status, header)
    assert json.loads(bytes(answer.body))["error"]["message"] == "Later."
