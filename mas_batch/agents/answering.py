"""Ask one agent about the records of a partition: prompts, long texts, parsing. Knows no Dask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mas_batch.engines.base import Completion, Engine, Request, Sampling
from mas_batch.engines.batching import complete
from mas_batch.errors import JobError, Reason, RecordError, RunError
from mas_batch.job import fingerprint
from mas_batch.records import Answer, Parsed, Record
from mas_batch.tasks.base import Fitted, Rewrite, Task
from mas_batch.tasks.splitting import Part

MAX_REWRITE = 0.9
"""What the parts' answers may keep of a text's length if they have to be cut again. Below 1, so
that the number of waves grows with the logarithm of the length and asking ends."""


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
class _Spent:
    """What the completions behind one answer took together, whatever came of it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    sum_logprob: float | None = 0.0
    """None as soon as one of them is unknown."""
    compute_s: float = 0.0
    finish_reason: str = "stop"
    """`error` if any failed, else `length` if any was cut, else `stop`."""

    def plus(self, completion: Completion) -> _Spent:
        known = self.sum_logprob is not None and completion.sum_logprob is not None
        reasons = {self.finish_reason, completion.finish_reason}
        return _Spent(
            self.prompt_tokens + completion.prompt_tokens,
            self.completion_tokens + completion.num_tokens,
            (self.sum_logprob or 0.0) + (completion.sum_logprob or 0.0) if known else None,
            self.compute_s + completion.compute_s,
            next(reason for reason in ("error", "length", "stop") if reason in reasons),
        )


@dataclass(frozen=True, slots=True)
class _Question:
    """A text to ask about: a record's in wave 0, later what a `Rewrite` made of its parts."""

    record: Record
    text: str
    samples: tuple[int, ...]
    """The sample numbers it is asked for: all of them in wave 0, one in later waves."""
    wave: int = 0
    num_parts: int = 1
    """Parts that wave 0 cut the record into."""
    spent: _Spent = _Spent()
    """In the waves before."""
    max_chars: float = math.inf
    """A longer text is not cut again, it is given up."""


def check_engine(task: Task, engine: Engine) -> None:
    """Refuse an engine that cannot do the task.

    Raises:
        JobError: a translation model is asked to do anything but translate.
    """
    if not engine.takes_messages and task.kind != "translate":
        name = engine.describe().get("engine", type(engine).__name__)
        raise JobError(
            f"{task.kind!r} is not allowed for an agent on the engine {name!r}: its model reads "
            "no prompt, it only translates; allowed: translate",
            key="task.kind",
        )


def prompt_hash(task: Task, profile: AgentProfile) -> str:
    """Hash the prompt as it is before a record's text and context are put in."""
    messages = task.messages("{text}", "{context}", prompt=profile.prompt, system=profile.system)
    return fingerprint([[message.role, message.content] for message in messages])


def answer_records(
    records: Sequence[Record], task: Task, engine: Engine, profile: AgentProfile
) -> list[Answer]:
    """Ask about every record that has no `reason`: one answer per record and sample, in order.

    All first requests go to the engine in one call, so that its batches are full; texts over
    the context are cut, asked in parts and joined per sample. What cannot be asked, answered
    or parsed becomes an answer with a reason. Tokens, seconds and log-probabilities are sums
    over all the completions behind an answer; `finish_reason` is `length` if any was cut.
    """
    asker = _Asker(task, engine, profile)
    samples = tuple(range(profile.sampling.num_samples))
    questions = [_Question(r, _text(r), samples) for r in records if r.reason is None]
    order = [(q.record.record_id, sample) for q in questions for sample in samples]
    answers: dict[tuple[str, int], Answer] = {}
    while questions:
        answered, questions = asker.ask(questions)
        answers.update(((a.record_id, a.sample_id), a) for a in answered)
    return [answers[key] for key in order]


def failed_answers(
    record: Record, profile: AgentProfile, reason: Reason, message: str
) -> list[Answer]:
    """Return what stands for the answers to a record that is not asked: one per sample."""
    return [
        Answer(
            record_id=record.record_id,
            agent_id=profile.agent_id,
            family_id=profile.family_id,
            sample_id=sample,
            text=None,
            finish_reason="error",
            reason=reason,
            message=message,
        )
        for sample in range(profile.sampling.num_samples)
    ]


def _text(record: Record) -> str:
    if record.text is None:
        raise RunError(f"record {record.record_id!r} has neither a text nor a reason for none")
    return record.text


@dataclass(frozen=True, slots=True)
class _Asker:
    task: Task
    engine: Engine
    profile: AgentProfile

    def ask(self, questions: Sequence[_Question]) -> tuple[list[Answer], list[_Question]]:
        """Ask one wave; return the answers that are final and the questions they raise."""
        answers: list[Answer] = []
        asked: list[tuple[_Question, Fitted]] = []
        for question in questions:
            try:
                asked.append((question, self._fit(question)))
            except RecordError as error:
                failed = dataclasses.replace(question.spent, finish_reason="error")
                answers += [self._failed(question, s, failed, error) for s in question.samples]
        # A wave's questions all ask for equally many samples: all of them, or one each.
        sampling = dataclasses.replace(self.profile.sampling, num_samples=len(questions[0].samples))
        requests = [self._request(q, f, i) for q, f in asked for i in range(len(f.parts))]
        replies = iter(complete(self.engine, requests, sampling))
        raised: list[_Question] = []
        for question, fitted in asked:
            by_sample = zip(*islice(replies, len(fitted.parts)), strict=True)
            for sample, completions in zip(question.samples, by_sample, strict=True):
                outcome = self._settle(question, fitted, sample, completions)
                if isinstance(outcome, Answer):
                    answers.append(outcome)
                else:
                    raised.append(outcome)
        return answers, raised

    def _fit(self, question: _Question) -> Fitted:
        """Return the text whole if the engine's context holds it, else in parts.

        Raises:
            RecordError: `too_long`.
        """
        context = question.record.context

        def fits(text: str, context: str | None) -> bool:
            prompt_tokens = self.engine.prompt_tokens(self._prompt(text, context))
            room = self.engine.max_context_tokens - self.profile.sampling.max_new_tokens
            return prompt_tokens <= room

        if fits(question.text, context):
            return Fitted((Part(question.text),), context, 1)
        try:
            if len(question.text) > question.max_chars:
                raise RecordError(Reason.TOO_LONG, "the answers to its parts hardly shorten it")
            return self.task.fit(question.text, context, fits)
        except RecordError as error:
            raise RecordError(error.reason, f"{error.message}; {self._limits()}") from None

    def _limits(self) -> str:
        return (
            f"the context is {self.engine.max_context_tokens} tokens, "
            f"{self.profile.sampling.max_new_tokens} of them for the answer (task.max_new_tokens)"
        )

    def _prompt(self, text: str, context: str | None, name: str = "", seed: int = 0) -> Request:
        messages = self.task.messages(
            text, context, prompt=self.profile.prompt, system=self.profile.system
        )
        return Request(name, text, messages, seed)

    def _request(self, question: _Question, fitted: Fitted, part: int) -> Request:
        record_id, wave, sample = question.record.record_id, question.wave, question.samples[0]
        # Only the request's own names: its random stream must not depend on its neighbours.
        identity = [self.profile.seed, self.profile.agent_id, record_id, wave, sample, part]
        seed = int(fingerprint(identity), 16) >> 1  # 63 bits: many samplers take a signed int64
        name = f"{record_id}#{wave}.{sample}.{part}"
        return self._prompt(fitted.parts[part].text, fitted.context, name, seed)

    def _settle(
        self,
        question: _Question,
        fitted: Fitted,
        sample: int,
        completions: Sequence[Completion],
    ) -> Answer | _Question:
        """Make of a sample's completions, one per part, an answer or a further question."""
        spent = question.spent
        for completion in completions:
            spent = spent.plus(completion)
        if question.wave == 0:
            question = dataclasses.replace(question, num_parts=fitted.num_parts)
        try:
            parsed = list(self._parse(completions))
        except RecordError as error:
            return self._failed(question, sample, spent, error)
        joined = parsed[0] if len(parsed) == 1 else self.task.join(parsed, fitted.parts)
        if isinstance(joined, Rewrite):
            return dataclasses.replace(
                question,
                text=joined.text,
                samples=(sample,),
                wave=question.wave + 1,
                spent=spent,
                max_chars=MAX_REWRITE * len(question.text),
            )
        return self._answered(question, sample, spent, joined)

    def _parse(self, completions: Sequence[Completion]) -> Iterator[Parsed]:
        for number, completion in enumerate(completions, 1):
            try:
                if completion.reason is not None:
                    raise RecordError(completion.reason, completion.message)
                yield self.task.parse(completion.text)
            except RecordError as error:
                if len(completions) == 1:
                    raise
                place = f"part {number} of {len(completions)}"
                raise RecordError(error.reason, f"{place}: {error.message}") from None

    def _answered(self, question: _Question, sample: int, spent: _Spent, parsed: Parsed) -> Answer:
        return Answer(
            record_id=question.record.record_id,
            agent_id=self.profile.agent_id,
            family_id=self.profile.family_id,
            sample_id=sample,
            text=parsed.text,
            label=parsed.label,
            value=parsed.value,
            sum_logprob=spent.sum_logprob,
            finish_reason=spent.finish_reason,
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
            num_parts=question.num_parts,
            t_compute_s=spent.compute_s,
        )

    def _failed(
        self, question: _Question, sample: int, spent: _Spent, error: RecordError
    ) -> Answer:
        """Record what went wrong; what it took is kept, a likelihood of no answer is not."""
        return Answer(
            record_id=question.record.record_id,
            agent_id=self.profile.agent_id,
            family_id=self.profile.family_id,
            sample_id=sample,
            text=None,
            finish_reason=spent.finish_reason,
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
            num_parts=question.num_parts,
            t_compute_s=spent.compute_s,
            reason=error.reason,
            message=error.message,
        )
