"""An OpenAI-compatible endpoint: one question, one reply, however often it has to be asked.

    408, 409, 429, 5xx        asked again after what Retry-After says, or after 1, 2, 4 ... seconds
    timeout, cut, no JSON     likewise
    400, 422, response_format asked with less structure, down to plain text
    everything else           given up at once

What a failed request cost is unknown unless its status is below 500: its worst case counts.

The openai client's own retries are off: it would send what no budget has allowed. Replies are read
up to a limit, redirects are not followed, and the key is taken out of every message.
"""

import asyncio
import email.utils
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
import openai
from pydantic import BaseModel, Field, NonNegativeInt, TypeAdapter, ValidationError

from microclip_deploy.describe import replies
from microclip_deploy.describe.budget import Charge, Usage
from microclip_deploy.describe.questions import Message
from microclip_deploy.errors import EnvironmentProblem, UsageError, printable

ATTEMPTS = 6
"""Of a question, until the run is given up."""

FIRST_WAIT_S = 1.0
"""Before the second attempt; doubled before each further one, and shortened at random."""

LONGEST_WAIT_S = 300
"""That an endpoint may ask for; where it wants more, the run is given up."""

LARGEST_REPLY = 4 << 20
"""Bytes; a hundred sentences and what a model may have thought before."""

TEMPLATE_TOKENS = 256
"""Most that a chat template is taken to add to a prompt."""

_ATTEMPTED_AGAIN = (408, 409, 429)
_CONNECT_S = 10
_SHOWN = 300  # characters of an endpoint's message

Attempt = Callable[[Usage], AbstractAsyncContextManager[Charge]]
"""What may send a request of this worst case, and notes what it used."""


class Reply(NamedTuple):
    """What the model said."""

    text: str
    reply_id: str
    problem: str
    """Why the text is not whole; '' if it is."""


class _Said(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Said
    finish_reason: str | None = None


class _Body(BaseModel):
    id: str | None = None
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


class _Used(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


_USED: TypeAdapter[_Used] = TypeAdapter(_Used)


class _Again(Exception):
    """The question may be asked again."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Simpler(Exception):
    """The question is to be asked with less structure, at once."""


def _shapes(count: int) -> tuple[dict[str, Any] | None, ...]:
    """Return the ways to ask for JSON, the strictest first; None asks with words alone."""
    schema = replies.schema(count)
    named = {"name": "sentences", "strict": True, "schema": schema}
    return (
        {"type": "json_schema", "json_schema": named},
        {"type": "json_object", "schema": schema},  # llama-cpp-python, Together, Fireworks
        {"type": "json_object"},
        None,
    )


class _Bounded(httpx2.AsyncByteStream):
    """A body that ends with an error where it grows too large."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > LARGEST_REPLY:
                raise httpx2.DecodingError(f"a reply of more than {LARGEST_REPLY >> 20} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    """Limit what is read of a body; what was compressed against our wish could grow later."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx2.DecodingError("a compressed reply, where none was asked for")
    response.stream = _Bounded(response.stream)  # type: ignore[arg-type]  # async, as the client


class Endpoint:
    """A model behind an address."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        *,
        temperature: float,
        seed: int,
        timeout_s: float,
    ) -> None:
        """Take the address; nothing is sent.

        Args:
            url: base URL of the API, such as http://localhost:8000/v1.
            model: its name there.
            key: API key; None for an endpoint that asks for none.
            temperature: of sampling.
            seed: of sampling, for endpoints that take one.
            timeout_s: of a reply, from the request to its last byte.

        Raises:
            UsageError: no such address, or one with credentials in it.
        """
        self.name = endpoint_name(url)
        self._model, self._key, self._timeout_s = model, key, timeout_s
        self._sampling = {"temperature": temperature, "seed": seed}
        self._shape = 0
        self._most = "max_tokens"
        self._not_before = 0.0
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=url,
            max_retries=0,
            timeout=httpx2.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [_bound]}
            ),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(
        self, messages: Sequence[Message], *, count: int, max_tokens: int, attempt: Attempt
    ) -> Reply:
        """Return the reply to a conversation.

        Args:
            messages: the conversation.
            count: sentences that are asked for.
            max_tokens: of the reply.
            attempt: entered around each request.

        Raises:
            EnvironmentProblem: the endpoint cannot be reached, or refuses.
            ThresholdError: `attempt` allows no more.
        """
        worst = worst_case(messages, count=count, max_tokens=max_tokens)
        failed = 0
        while True:
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                async with attempt(worst) as charge:
                    body = self._body(messages, count, max_tokens)
                    return await self._send(body, count, charge)
            except _Simpler:
                continue
            except _Again as again:
                failed += 1
                if failed == ATTEMPTS:
                    raise self._given_up(f"{again} (asked {ATTEMPTS} times)") from None
                self._postpone(again.wait_s, failed)

    def _body(self, messages: Sequence[Message], count: int, max_tokens: int) -> dict[str, Any]:
        sampling = {**self._sampling, self._most: max_tokens}
        asked = {"model": self._model, "messages": list(messages), **sampling}
        shape = _shapes(count)[self._shape]
        return asked if shape is None else {**asked, "response_format": shape}

    def _postpone(self, wait_s: float | None, failed: int) -> None:
        """Let all questions wait for as long as the endpoint asked, or ever longer.

        Raises:
            EnvironmentProblem: the endpoint asked for too long.
        """
        if wait_s is None:
            wait_s = FIRST_WAIT_S * 2 ** (failed - 1) * random.uniform(0.5, 1)
        if wait_s > LONGEST_WAIT_S:
            raise self._given_up(f"asks to wait for {wait_s:.0f} seconds; wait that long")
        self._not_before = max(self._not_before, time.monotonic() + wait_s)

    async def _send(self, body: dict[str, Any], count: int, charge: Charge) -> Reply:
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.post(
                    "/chat/completions", cast_to=httpx2.Response, body=body
                )
        except (TimeoutError, openai.APITimeoutError):
            raise _Again(f"gave no whole reply within {self._timeout_s:g} seconds") from None
        except openai.APIStatusError as error:
            if error.status_code < 500:  # behind a gateway that failed, the model may have run
                charge.used = Usage()
            raise self._refusal(error, body, count) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
                charge.used = Usage()
            raise _Again(self._said(str(cause) or type(cause).__name__)) from None
        return self._reply(response.content, charge)

    def _reply(self, content: bytes, charge: Charge) -> Reply:
        try:
            body = _Body.model_validate_json(content)
        except ValidationError:
            raise _Again("sent what is no reply of the protocol") from None
        try:
            used = _USED.validate_python(body.usage)
            charge.used = Usage(used.prompt_tokens, used.completion_tokens)
        except ValidationError:
            pass  # it does not tell: the worst case stays
        choice = body.choices[0]
        cut = {"length": "it is longer than allowed", "content_filter": "it was filtered"}
        problem = cut.get(choice.finish_reason or "", "")
        if choice.message.refusal:
            problem = "the model refuses"
        text = self._scrubbed(choice.message.content or "")
        return Reply(text, self._said(body.id or "")[:100], problem)

    def _refusal(self, error: openai.APIStatusError, body: dict[str, Any], count: int) -> Exception:
        """Return what to do about an error status."""
        status = error.status_code
        told = error.body.get("message") if isinstance(error.body, dict) else None
        text = told if isinstance(told, str) else str(error)
        refused = status in (400, 422) or "response_format" in text  # llama-cpp-python: 500
        if refused and (simpler := self._simplified(text, body, count)):
            return simpler
        said = self._said(text)
        if error.code != "insufficient_quota" and (status in _ATTEMPTED_AGAIN or status >= 500):
            return _Again(f"answers {status}: {said}", _retry_after(error.response.headers))
        return self._given_up(f"answers {status}: {said}")

    def _simplified(self, told: str, body: dict[str, Any], count: int) -> _Simpler | None:
        """Ask for less from now on, if this request asked for something that can be left out."""
        if "max_completion_tokens" in told and "max_tokens" in body:
            self._most = "max_completion_tokens"
            return _Simpler()
        if "response_format" not in body:
            return None
        if body["response_format"] == _shapes(count)[self._shape]:  # or another call was faster
            self._shape += 1
        return _Simpler()

    def _given_up(self, reason: str) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"expected replies of the model '{printable(self._model)}' at {self.name}, found that "
            f"it {reason}; check address, model, key and limits there"
        )

    def _said(self, text: str) -> str:
        """Return what came from elsewhere: without the key, on one line, not too long."""
        return printable(" ".join(self._scrubbed(text).split()))[:_SHOWN]

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def api_key(url: str) -> str | None:
    """Return the key in MICROCLIP_LLM_KEY or OPENAI_API_KEY; None if neither is set.

    Args:
        url: of the endpoint; OpenAI's own takes no question without a key.

    Raises:
        EnvironmentProblem: it holds what no header can, or is missing.
    """
    key = (os.environ.get("MICROCLIP_LLM_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise EnvironmentProblem(
            "MICROCLIP_LLM_KEY or OPENAI_API_KEY: expected printable ASCII, found other "
            "characters; set it again"
        )
    if not key and urlsplit(url).hostname == "api.openai.com":
        raise EnvironmentProblem(
            "OPENAI_API_KEY: expected a key for api.openai.com, found none; set it, or give the "
            "--endpoint of another server"
        )
    return key or None


def endpoint_name(url: str) -> str:
    """Return host and path of an address: what may be written down of it.

    Raises:
        UsageError: it is no address, or holds credentials or a query.
    """
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            "--endpoint: expected a base URL such as http://localhost:8000/v1, found another text; "
            "give http or https, host and path"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            f"--endpoint: expected host and path alone, found more beside {parts.hostname}; the "
            "key belongs into OPENAI_API_KEY"
        )
    return f"{parts.hostname}{port}{parts.path.rstrip('/')}"


def worst_case(messages: Sequence[Message], *, count: int, max_tokens: int) -> Usage:
    """Return the most tokens that a request can use.

    Args:
        messages: the conversation.
        count: sentences that are asked for.
        max_tokens: of the reply.
    """
    text = str([messages, replies.schema(count)])
    return Usage(len(text.encode("utf-8", "replace")) + TEMPLATE_TOKENS, max_tokens)


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Return the seconds that an endpoint asks to wait; None if it does not."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
