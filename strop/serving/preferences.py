"""The page's "prefer this one": two answers to one chat become a ranking in a preference store."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from dataclasses import dataclass

from strop.ranking import Answer as Verdict
from strop.ranking import PreferenceStore, submit
from strop.ranking.queue import present
from strop.serving.calls import Call
from strop.serving.fields import ApiError
from strop.types import Completion

MAX_KEPT = 1000
"""Answers that can still be preferred; older ones are forgotten."""


@dataclass(frozen=True, slots=True)
class _Kept:
    call: Call
    completion: Completion


class Preferences:
    """Remembers the answers that this server gave, so that a client names two by id and cannot make any up."""

    def __init__(self, store: PreferenceStore, annotator: str = "page") -> None:
        self._store = store
        self._annotator = annotator
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def keep(self, answer_id: str, call: Call, completion: Completion) -> None:
        self._kept[answer_id] = _Kept(call, completion)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def prefer(self, chosen: str, rejected: str) -> int:
        """Store that one answer is better than the other; returns the row's id, the same for the same two again."""
        if chosen not in self._kept or rejected not in self._kept:
            raise ApiError(404, "this server no longer knows that answer", code="answer_not_found")
        better, worse = self._kept[chosen], self._kept[rejected]
        if better.call.messages != worse.call.messages:
            raise ApiError(400, "the answers belong to different chats")
        store = self._store
        try:
            with store.transaction():
                prompt_id = store.add_prompt(better.call.messages)
                item = store.add_item_of(
                    prompt_id, [self._response(prompt_id, *one) for one in ((chosen, better), (rejected, worse))]
                )
                shown = present(store, item, self._annotator)
                place = {text: number for number, text in enumerate(shown.completions)}
                ranks = [2, 2]
                ranks[place[better.completion.text]] = 1
                uuid = f"{chosen[-30:]}-{rejected[-30:]}"
                return submit(store, shown.id, self._annotator, Verdict(uuid=uuid, ranks=ranks))
        except ValueError:
            raise ApiError(400, "answers that are empty or equal cannot be compared") from None

    def _response(self, prompt_id: str, answer_id: str, kept: _Kept) -> int:
        served, request = kept.call.served, kept.call.requests[0]
        sampling = {**dataclasses.asdict(request.sampling), "seed": request.seed, "answer": answer_id}
        policy = self._store.add_policy(served.name, served.weights_sha256)
        text, reason = kept.completion.text, kept.completion.finish_reason
        return self._store.add_response(prompt_id, policy, json.dumps(sampling, sort_keys=True), 0, text, reason)
