"""Relativity score (Figure 2c): how directly a response bears on its question, by an external model.

The model stands behind an OpenAI-compatible `/v1/chat/completions`. It is asked for one integer at
temperature 0; it sees the question and the response, not the image. A reply without one is counted, never
guessed. Nothing is asked unless a URL and a model were named; a key is taken from OPENAI_API_KEY.
"""

import concurrent.futures
import dataclasses
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

LOWEST, HIGHEST = 1, 5
PROMPT = """How directly does the response bear on the question? Judge relevance alone, not correctness.
5: every step serves the question. 3: about half of it does. 1: it hardly has to do with the question.

<question>
{question}
</question>

<response>
{response}
</response>

Reply with one integer from 1 to 5 and nothing else."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """Where and how to ask.

    Attributes:
      url: of the endpoint, or its base, with or without /v1.
      model: its name there.
      calls: at most that many responses are asked about.
      timeout: seconds that one request may take.
      tries: requests for one response; the pause between them doubles from `pause` seconds.
      workers: requests at a time.
      broken: failed responses in a row after which nothing more is asked.
    """

    url: str
    model: str
    calls: int = 200
    timeout: float = 30.0
    tries: int = 3
    pause: float = 0.5
    workers: int = 4
    broken: int = 4

    def endpoint(self) -> str:
        """The whole URL.

        Raises:
          ValueError: it is neither http nor https.
        """
        url = self.url.rstrip("/")
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"the judge's URL must begin with http:// or https://, got {self.url!r}")
        if url.endswith("/chat/completions"):
            return url
        return url + ("/chat/completions" if url.endswith("/v1") else "/v1/chat/completions")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """What came back.

    Attributes:
      scores: per (question, response): 1..5, None without a readable reply.
      unparsable: replies that hold no single integer from 1 to 5.
      failed: responses without a reply.
      error: of the last failure; empty where there was none.
    """

    scores: list[int | None]
    unparsable: int
    failed: int
    error: str


def parse(reply: str) -> int | None:
    """The one integer from 1 to 5 in a reply, also as `4/5`; None where there is none, or several."""
    text = re.sub(r"(?s)<think>.*?</think>", "", reply)
    text = re.sub(rf"(?:/|\bout of)\s*{HIGHEST}\b", "", text)
    found = set(re.findall(r"-?\d+(?:\.\d+)?", text))
    value = found.pop() if len(found) == 1 else ""
    return int(value) if value.isdigit() and LOWEST <= int(value) <= HIGHEST else None


def rate(judge: Judge, pairs: Sequence[tuple[str, str]]) -> Ratings:
    """Asks about (question, response) pairs, the first `judge.calls` of them.

    Raises:
      ValueError: the URL is no http(s) address.
    """
    endpoint = judge.endpoint()
    lock, in_a_row, error = threading.Lock(), 0, ""

    def ask(pair: tuple[str, str]) -> str | None:
        nonlocal in_a_row, error
        if in_a_row >= judge.broken:
            return None
        reply, why = _ask(judge, endpoint, PROMPT.format(question=pair[0], response=pair[1]))
        with lock:
            in_a_row = 0 if reply is not None else in_a_row + 1
            error = why or error
        return reply

    with concurrent.futures.ThreadPoolExecutor(judge.workers) as pool:
        replies = list(pool.map(ask, pairs[: judge.calls]))
    scores = [None if reply is None else parse(reply) for reply in replies]
    failed = sum(reply is None for reply in replies)
    return Ratings(scores, sum(s is None for s in scores) - failed, failed, error)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _ask(judge: Judge, endpoint: str, prompt: str) -> tuple[str | None, str]:
    """(reply, empty) or (None, why there is none)."""
    message = {"role": "user", "content": prompt}
    body = {"model": judge.model, "messages": [message], "temperature": 0, "max_tokens": 512}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    opener, why = urllib.request.build_opener(_NoRedirect), ""
    for attempt in range(judge.tries):
        if attempt:
            time.sleep(judge.pause * 2 ** (attempt - 1))
        request = urllib.request.Request(endpoint, json.dumps(body).encode(), headers, method="POST")
        try:
            with opener.open(request, timeout=judge.timeout) as response:
                content = json.loads(response.read(1_000_000))["choices"][0]["message"]["content"]
            return str(content), ""
        except urllib.error.HTTPError as error:
            why = f"HTTP status {error.code}"
            error.close()
            if error.code not in (408, 409, 429) and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            why = f"{type(error).__name__}: {error}"
        except (ValueError, KeyError, IndexError, TypeError) as error:
            why = f"not a chat completion ({type(error).__name__})"
    return None, why
