"""Relativity score (Figure 2c): how directly a response bears on its question, judged by an external model.

The judge is served by an OpenAI-compatible `/v1/chat/completions`. It is asked at temperature 0 for one
integer, and sees the question and the response, but not the image. Replies without an integer are counted,
never guessed. No request is made unless a URL and a model are given. The key is read from OPENAI_API_KEY.
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

LOWEST = 1
HIGHEST = 5
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
      calls: maximum number of responses to ask about.
      timeout: of a request, in seconds.
      tries: maximum number of requests for one response.
      pause: seconds before the second try; doubles with every further try.
      workers: number of concurrent requests.
      broken: number of consecutive failures after which no more requests are made.
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
          ValueError: the URL is neither http nor https.
        """
        url = self.url.rstrip("/")
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"the judge's URL must begin with http:// or https://, got {self.url!r}")
        if url.endswith("/chat/completions"):
            return url
        return url + ("/chat/completions" if url.endswith("/v1") else "/v1/chat/completions")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """What the judge replied.

    Attributes:
      scores: 1..5 for each (question, response), or None if there is no readable reply.
      unparsable: number of replies without a single integer from 1 to 5.
      failed: number of responses without a reply.
      error: message of the last failure; empty if there was none.
    """

    scores: list[int | None]
    unparsable: int
    failed: int
    error: str


def parse(reply: str) -> int | None:
    """The only integer from 1 to 5 in a reply, also as `4/5`; None if there is none, or several."""
    text = re.sub(r"(?s)<think>.*?</think>", "", reply)
    text = re.sub(rf"(?:/|\bout of)\s*{HIGHEST}\b", "", text)
    found = set(re.findall(r"-?\d+(?:\.\d+)?", text))
    value = found.pop() if len(found) == 1 else ""
    return int(value) if value.isdigit() and LOWEST <= int(value) <= HIGHEST else None


def rate(judge: Judge, pairs: Sequence[tuple[str, str]]) -> Ratings:
    """Asks about the first `judge.calls` of the (question, response) pairs.

    Raises:
      ValueError: the URL is neither http nor https.
    """
    endpoint = judge.endpoint()
    lock = threading.Lock()
    in_a_row = 0
    error = ""

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
    """Refuses redirects, which would send the key to another host."""

    def redirect_request(self, *_, **__) -> None:
        return None


def _ask(judge: Judge, endpoint: str, prompt: str) -> tuple[str | None, str]:
    """(reply, empty text), or (None, the reason)."""
    message = {"role": "user", "content": prompt}
    body = {"model": judge.model, "messages": [message], "temperature": 0, "max_tokens": 512}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    opener = urllib.request.build_opener(_NoRedirect)
    why = ""
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
