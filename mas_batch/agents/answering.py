"""Ask one agent about the records of a partition: prompts, long texts, parsing. Knows no Dask."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, count, islice

from mas_batch.agents.account import add, failed, given_up, succeeded
from mas_batch.agents.label_reading import read_labels
from mas_batch.engines.base import (
    Completion,
    EngineClient,
    Message,
    Request,
    Sampling,
    TokenizedPrompt,
)
from mas_batch.errors import Reason, RecordError, RunError
from mas_batch.job import fingerprint
from mas_batch.records import Answer, Parsed, Record
from mas_batch.tasks.base import Fitted, Task
from mas_batch.tasks.longdoc import (
    Extractive,
    Hierarchical,
    Piece,
    evidence,
    extract,
    merge_group,
    merge_text,
    pack,
)
from mas_batch.tasks.splitting import Part


@dataclass(frozen=True, slots=True)
class AgentProfile:
    """Who answers, and with which prompt and decoding."""

    agent_id: str
    family_id: str
    """The model; voters of one family err alike."""
    prompt: str | None
    """Template in place of the job's and the task's own; None keeps theirs."""
    system: str | None
    sampling: Sampling
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """An answer in pieces that the agent has still to merge."""

    answer: Answer
    """Without a text yet: whose it is, and what the completions behind it took so far."""
    context: str | None
    """Background, as it was shown with every part."""
    pieces: tuple[Piece, ...]
    """In the document's order, at least two."""
    merging: Hierarchical


_NOWHERE = ("", 0, 0, 0)
"""The place of a request that is no record's."""


def prompt_hash(task: Task, profile: AgentProfile) -> str:
    """Hash the prompt as it is before a record's text and context are put in."""
    messages = task.messages("{text}", "{context}", prompt=profile.prompt, system=profile.system)
    return fingerprint([[message.role, message.content] for message in messages])


def answer_records(
    records: Sequence[Record], task: Task, client: EngineClient, profile: AgentProfile
) -> list[Answer]:
    """Ask about every record that has no `reason`: one answer per record and sample, in order.

    All first requests go to the engine in one call, so that its batches are full; requests of
    other agents and partitions may share them. A text over the context is asked about in parts;
    where the task merges their answers by asking again, each level of merging, of all records
    and samples, is one call too. What cannot be asked,
    answered, parsed or merged becomes an answer with a reason. Tokens, seconds and
    log-probabilities are sums over all the completions behind an answer; `finish_reason` is
    the last merge's where there is one, else `length` if any part was cut.
    """
    asker = _Asker(task, client, profile)
    good = [record for record in records if record.reason is None]
    answers: dict[tuple[str, int], Answer] = {}
    outcomes = asker.ask(good)
    for level in count(1):
        settled = (outcome for outcome in outcomes if isinstance(outcome, Answer))
        answers.update(((answer.record_id, answer.sample_id), answer) for answer in settled)
        drafts = [outcome for outcome in outcomes if isinstance(outcome, _Draft)]
        if not drafts:
            break
        outcomes = asker.merge(drafts, level)
    samples = range(profile.sampling.num_samples)
    return [answers[record.record_id, sample] for record in good for sample in samples]


def failed_answers(
    record: Record, profile: AgentProfile, reason: Reason, message: str
) -> list[Answer]:
    """Return what stands for the answers to a record that is not asked: one per sample."""
    error, samples = RecordError(reason, message), range(profile.sampling.num_samples)
    return [given_up(_blank(record, profile, sample), error) for sample in samples]


def _with_time(completion: Completion, more_s: float) -> Completion:
    """Add seconds of reading to a completion."""
    prefill_s = completion.prefill_s
    return replace(
        completion,
        compute_s=completion.compute_s + more_s,
        prefill_s=None if prefill_s is None else prefill_s + more_s,
    )


def _text(record: Record) -> str:
    if record.text is None:
        raise RunError(f"record {record.record_id!r} has neither a text nor a reason for none")
    return record.text


def _blank(record: Record, profile: AgentProfile, sample: int) -> Answer:
    """Begin an answer: nothing is said and nothing was spent."""
    return Answer(
        record.record_id,
        profile.agent_id,
        profile.family_id,
        sample,
        text=None,
        sum_logprob=0.0,
        t_prefill_s=0.0,
        cached_tokens=0,
    )


@dataclass(frozen=True)  # no slots: it keeps the tokens of the template
class _Asker:
    task: Task
    client: EngineClient
    profile: AgentProfile

    def ask(self, records: Sequence[Record]) -> list[Answer | _Draft]:
        """Ask about the records, whole or in parts, in one call."""
        outcomes: list[Answer | _Draft] = []
        asked: list[tuple[Record, Fitted]] = []
        requests: list[Request] = []
        for record in records:
            try:
                fitted, about = self._fit(record)
            except RecordError as error:
                outcomes += failed_answers(record, self.profile, error.reason, error.message)
            else:
                asked.append((record, fitted))
                requests += about
        replies = iter(self._complete(requests))
        for record, fitted in asked:
            outcomes += self._settle(record, fitted, list(islice(replies, len(fitted.parts))))
        return outcomes

    def merge(self, drafts: Sequence[_Draft], level: int) -> list[Answer | _Draft]:
        """Merge neighbouring pieces, as many as fit a prompt, of all drafts in one call."""
        outcomes: list[Answer | _Draft] = []
        planned: list[tuple[_Draft, list[tuple[Piece, ...]]]] = []
        for draft in drafts:
            groups = pack(draft.pieces, partial(self._mergeable, draft))
            if len(groups) < len(draft.pieces):
                planned.append((draft, groups))
            else:
                message = "no two neighbouring answers to its parts fit a prompt together"
                error = RecordError(Reason.TOO_LONG, f"{message}; {self._limits()}")
                outcomes.append(given_up(draft.answer, error))
        requests = [
            self._merge_request(draft, group, level)
            for draft, groups in planned
            for group in groups
            if len(group) > 1
        ]
        sampling = replace(self.profile.sampling, num_samples=1)
        replies = chain.from_iterable(self.client.complete(requests, sampling))
        outcomes += [self._settle_level(draft, groups, replies) for draft, groups in planned]
        return outcomes

    def _complete(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Ask; where labels are read, their probabilities are corrected, and `text` is one of them.

        For that an empty text is asked about too, in every context that the prompts show: without
        one, once for all partitions. Its time is theirs in equal parts, if it was asked about now.
        """
        sampling, known = self.profile.sampling, self.client.known
        if not sampling.choices or not requests:
            return self.client.complete(requests, sampling)
        plain = self._request(_NOWHERE, "", None)
        empties = [self._empty(request.context, plain) for request in requests]
        new = [empty for empty in dict.fromkeys(empties) if (empty, sampling) not in known]
        replies = [one for (one,) in self.client.complete([*new, *requests], sampling)]
        asked, found = dict(zip(new, replies, strict=False)), replies[len(new) :]
        if plain in asked and asked[plain].reason is None:
            known[plain, sampling] = asked[plain]
        priors = [asked[e] if e in asked else known[e, sampling] for e in empties]
        shares = Counter(empties)
        read = read_labels(sampling.choices, found, priors)
        return [
            [_with_time(one, asked[e].compute_s / shares[e] if e in asked else 0.0)]
            for one, e in zip(read, empties, strict=True)
        ]

    def _empty(self, context: str | None, plain: Request) -> Request:
        """Ask about an empty text in that context; `plain` where the prompt shows no context."""
        own = self._request(_NOWHERE, "", context) if context is not None else plain
        return plain if own.messages == plain.messages else own

    def _fit(self, record: Record) -> tuple[Fitted, list[Request]]:
        """Return the text, whole if the context holds it, else in parts, and a request for each.

        Raises:
            RecordError: `too_long`.
        """
        text, context = _text(record), record.context
        request = self._request((record.record_id, 0, 0, 0), text, context)
        prompt = self.client.tokenize(request)
        if self._has_room(prompt):
            return Fitted((Part(text),), context, 1), [replace(request, tokenized=prompt)]

        def fits(text: str, context: str | None) -> bool:
            return self._has_room(self.client.tokenize(self._request(_NOWHERE, text, context)))

        try:
            fitted = self.task.fit(text, context, fits)
        except RecordError as error:
            raise RecordError(error.reason, f"{error.message}; {self._limits()}") from None
        return fitted, [
            self._request((record.record_id, 0, 0, number), part.text, fitted.context)
            for number, part in enumerate(fitted.parts)
        ]

    def _has_room(self, prompt: TokenizedPrompt) -> bool:
        room = self.client.max_context_tokens - self.profile.sampling.max_new_tokens
        return prompt.num_tokens <= room

    def _limits(self) -> str:
        return (
            f"the context is {self.client.max_context_tokens} tokens, "
            f"{self.profile.sampling.max_new_tokens} of them for the answer (task.max_new_tokens)"
        )

    def _mergeable(self, draft: _Draft, group: Sequence[Piece]) -> bool:
        return self._has_room(self.client.tokenize(self._merge_request(draft, group, 0)))

    def _merge_request(self, draft: _Draft, group: Sequence[Piece], level: int) -> Request:
        place = (draft.answer.record_id, level, draft.answer.sample_id, group[0].first)
        return self._request(place, merge_text(group), draft.context, draft.merging.prompt)

    def _request(
        self,
        place: tuple[str, int, int, int],
        text: str,
        context: str | None,
        prompt: str | None = None,
    ) -> Request:
        """Build a request; `place` is the record, the level, the sample and the part."""
        record_id, level, sample, part = place
        # Only the request's own names: its random stream must not depend on its neighbours.
        identity = [self.profile.seed, self.profile.agent_id, record_id, level, sample, part]
        seed = int(fingerprint(identity), 16) >> 1  # 63 bits: many samplers take a signed int64
        own = prompt if prompt is not None else self.profile.prompt
        messages = self.task.messages(text, context, prompt=own, system=self.profile.system)
        return Request(f"{record_id}#{level}.{sample}.{part}", text, messages, seed, context)

    def _settle(
        self, record: Record, fitted: Fitted, replies: Sequence[Sequence[Completion]]
    ) -> Iterator[Answer | _Draft]:
        """Make of the replies, by part and sample, an answer or a draft per sample."""
        merging = self.task.merging(self.profile.prompt) if len(fitted.parts) > 1 else None
        limit = merging.num_evidence if merging is not None else 0
        quotes = [evidence(part.text, self._is_short, limit) for part in fitted.parts]
        for sample, completions in enumerate(zip(*replies, strict=True)):
            blank = replace(_blank(record, self.profile, sample), num_parts=fitted.num_parts)
            answer = add(blank, completions)
            try:
                parsed = self._parse_parts(completions)
            except RecordError as error:
                yield failed(answer, error)
                continue
            if merging is None:
                joined = parsed[0] if len(parsed) == 1 else self.task.join(parsed, fitted.parts)
                yield succeeded(answer, joined)
                continue
            answered = enumerate(zip(parsed, quotes, completions, strict=True), 1)
            pieces = tuple(
                Piece(p.text, quoted, i, i, cut=completion.finish_reason == "length")
                for i, (p, quoted, completion) in answered
            )
            if isinstance(merging, Extractive):
                yield succeeded(answer, Parsed(extract(pieces, self._is_short)))
            else:
                yield _Draft(answer, fitted.context, pieces, merging)

    def _settle_level(
        self, draft: _Draft, groups: Sequence[tuple[Piece, ...]], replies: Iterator[Completion]
    ) -> Answer | _Draft:
        """Put the merged answers in their groups' places; the replies are taken one per group."""
        completions = [next(replies) if len(group) > 1 else None for group in groups]
        given = [completion for completion in completions if completion is not None]
        answer = add(draft.answer, given)
        pieces: list[Piece] = []
        try:
            for group, completion in zip(groups, completions, strict=True):
                if completion is None:
                    pieces += group
                    continue
                stretch = f"merging parts {group[0].first} to {group[-1].last}"
                text = self._parse(completion, stretch).text
                pieces.append(merge_group(group, text, self._is_short, draft.merging.num_evidence))
        except RecordError as error:
            return failed(answer, error)
        if len(pieces) > 1:
            return replace(draft, answer=answer, pieces=tuple(pieces))
        # Which summaries were cut on the way does not show in the last one.
        answer = replace(answer, finish_reason=given[-1].finish_reason)
        return succeeded(answer, Parsed(pieces[0].text))

    def _is_short(self, text: str) -> bool:
        """Tell whether a text has no more tokens than an answer may have."""
        num_tokens = self._num_prompt_tokens(text) - self._num_template_tokens
        return num_tokens <= self.profile.sampling.max_new_tokens

    @cached_property
    def _num_template_tokens(self) -> int:
        return self._num_prompt_tokens("")

    def _num_prompt_tokens(self, text: str) -> int:
        return self.client.tokenize(Request("", text, (Message("user", text),))).num_tokens

    def _parse_parts(self, completions: Sequence[Completion]) -> list[Parsed]:
        if len(completions) == 1:
            return [self._parse(completions[0])]
        names = (f"part {number} of {len(completions)}" for number in count(1))
        return [self._parse(c, name) for c, name in zip(completions, names, strict=False)]

    def _parse(self, completion: Completion, place: str = "") -> Parsed:
        try:
            if completion.reason is not None:
                raise RecordError(completion.reason, completion.message)
            if completion.choice_logprobs:
                probs = tuple(map(math.exp, completion.choice_logprobs))
                return Parsed(completion.text, label=completion.text, probs=probs)
            return self.task.parse(completion.text)
        except RecordError as error:
            message = f"{place}: {error.message}" if place else error.message
            raise RecordError(error.reason, message) from None
