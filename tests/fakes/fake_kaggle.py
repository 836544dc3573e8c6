"""Kaggle on loopback: speaks the protocol of Kaggle's service and storage, and does wrong on demand.

It stands as an HTTP proxy before everything, so that the real client reaches it unpatched, whatever address it asks
for. Tests queue a fault for a call, by the name of the call's method, `GET` or `PUT`.
"""

import base64
import hashlib
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline.config import DataSettings
from pipeline.kaggle.api_errors import RetryPolicy

COMPETITION = "carvana-image-masking-challenge"
TOKEN = "KGAT_a-token-that-nobody-may-see"
USER, KEY = "somebody", "0123456789abcdef-a-key-that-nobody-may-see"
FROM_KAGGLE = DataSettings(source="kaggle")
SECRETS = (TOKEN, KEY, base64.b64encode(f"{USER}:{KEY}".encode()).decode(), "signature-")


QUICK = RetryPolicy(
    connect_s=5, read_s=1.5, tries=4, first_pause_s=0.01, longest_pause_s=0.02, lookup_s=0.6, first_poll_s=0.01
)
"""Patience of tests."""


def demand_nothing_secret(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text


@dataclass(frozen=True)
class Answer:
    """What goes back; with ``body_sent`` only that many bytes of the body do, and then the connection breaks."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    body_sent: int | None = None
    with_length: bool = True


Fault = Callable[["Handler", Callable[[], Answer]], Answer | None]
"""Called with what would make the true answer, and do what was asked; None: no answer at all."""


def status(code: int, message: str = "", headers: Mapping[str, str] | None = None) -> Fault:
    """An error of the service, which then does nothing."""
    body = json.dumps({"code": code, "message": message} if message else {}).encode()
    return lambda handler, make: Answer(code, body, {"Content-Type": "application/json", **(headers or {})})


def page(code: int, text: str = "<html>No.</html>") -> Fault:
    """An error as a page for browsers, or a page in place of a file."""
    return lambda handler, make: Answer(code, text.encode(), {"Content-Type": "text/html"})


def reset(handler: "Handler", make: Callable[[], Answer]) -> None:
    """The connection breaks before anything is done."""


def lose(handler: "Handler", make: Callable[[], Answer]) -> None:
    """What was asked is done, and the answer is lost."""
    make()


def hang(handler: "Handler", make: Callable[[], Answer]) -> None:
    """Nothing comes, for longer than any timeout."""
    handler.owner.hanging.wait(20)


def cut(bytes_sent: int) -> Fault:
    """The connection breaks after so many bytes of the body."""
    return lambda handler, make: replace(make(), body_sent=bytes_sent)


def drop_anew(bytes_sent: int) -> Fault:
    """Whatever part is asked for, the file comes from its beginning, and breaks off."""

    def fault(handler: "Handler", make: Callable[[], Answer]) -> Answer:
        del handler.headers["Range"]
        return replace(make(), body_sent=bytes_sent)

    return fault


def end_quietly(bytes_sent: int) -> Fault:
    """The body ends too early, and nothing said how long it would be."""

    def fault(handler: "Handler", make: Callable[[], Answer]) -> Answer:
        answer = make()
        return replace(answer, body=answer.body[:bytes_sent], with_length=False)

    return fault


def spoil(handler: "Handler", make: Callable[[], Answer]) -> Answer:
    """One byte is wrong."""
    answer = make()
    middle = len(answer.body) // 2
    return replace(answer, body=answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :])


def without(*names: str) -> Fault:
    """Headers are missing."""

    def fault(handler: "Handler", make: Callable[[], Answer]) -> Answer:
        answer = make()
        return replace(answer, headers={k: v for k, v in answer.headers.items() if k not in names})

    return fault


def both(first: Fault, second: Fault) -> Fault:
    """A fault on what another fault makes of the answer."""

    def fault(handler: "Handler", make: Callable[[], Answer]) -> Answer | None:
        return second(handler, lambda: first(handler, make) or Answer(500))

    return fault


def kill(after_bytes: int | None = None, *, done: bool = False) -> Fault:
    """The process that asks is killed: before anything is done, after it, or after so many bytes of the answer."""

    def fault(handler: "Handler", make: Callable[[], Answer]) -> Answer | None:
        if after_bytes is not None:
            handler.send(replace(make(), body_sent=after_bytes), break_off=False)
            time.sleep(0.3)  # for the bytes to be written
        elif done:
            make()
        os.kill(handler.owner.victim, signal.SIGKILL)
        return None

    return fault


class Take:
    """Only so many bytes of an upload are taken; then the connection breaks, or an answer comes."""

    def __init__(self, taken: int, answer: int | None = None) -> None:
        self.taken = taken
        self.answer = answer

    def __call__(self, handler: "Handler", make: Callable[[], Answer]) -> Answer | None:
        token = Path(urlsplit(handler.path).path).name
        handler.owner.uploads[token] += handler.rfile.read(self.taken)
        return Answer(self.answer) if self.answer else None


def expire(handler: "Handler", make: Callable[[], Answer]) -> Answer:
    """All addresses signed so far have expired."""
    handler.owner.signed.clear()
    return make()


class KaggleServer:
    """The service, its storage, and what it was asked."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.asked: list[str] = []
        self.ranges: list[str | None] = []
        self.submissions: list[dict[str, Any]] = []
        self.uploads: dict[str, bytearray] = {}
        self.upload_sizes: dict[str, int] = {}
        self.signed: set[str] = set()
        self.allowed = 5
        self.limited_by_total = False
        self.scored_after = 1
        self.board: list[tuple[str, str]] = []
        self.page_size = 2
        self.tokens = {TOKEN}
        self.keys = {(USER, KEY)}
        self.version = "1"
        self.listed_sizes: dict[str, int] = {}
        self.victim = 0
        self.hanging = threading.Event()
        self.lock = threading.Lock()
        self.polls: dict[int, int] = {}

    def fail(self, call: str, *faults: Fault) -> None:
        """Queue faults for the next answers to a call."""
        self.faults[call].extend(faults)

    def count(self, call: str) -> int:
        """Return how often a call was made."""
        return self.asked.count(call)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Run, and yield the address to set as HTTP_PROXY."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            self.hanging.set()
            server.shutdown()
            server.server_close()

    # ------------------------------------------------------------ the service

    def call(self, method: str, given: dict[str, Any]) -> Answer:
        """Do what was asked, and return the answer."""
        if "competitionName" in given and given["competitionName"] != COMPETITION:
            return refusal(403, "Permission 'competitions.get' was denied")
        return getattr(self, f"_{method}")(given)  # type: ignore[no-any-return]

    def _ListDataFiles(self, given: dict[str, Any]) -> Answer:
        files = [
            {
                "name": name,
                "totalBytes": self.listed_sizes.get(name, len(body)),
                "creationDate": f"2017-07-0{self.version}T00:00:00Z",
            }
            for name, body in sorted(self.files.items())
        ]
        return self._page(given, "files", files)

    def _DownloadDataFile(self, given: dict[str, Any]) -> Answer:
        name = given["fileName"]
        if name not in self.files:
            return refusal(404, "Not found")
        signature = f"signature-{len(self.asked)}"
        self.signed.add(signature)
        return Answer(302, b"", {"Location": f"http://storage.test/files/{name}?sig={signature}"})

    def _StartSubmissionUpload(self, given: dict[str, Any]) -> Answer:
        token = f"upload-{len(self.uploads)}"
        self.uploads[token] = bytearray()
        self.upload_sizes[token] = given["contentLength"]
        return found({"token": token, "createUrl": f"http://storage.test/uploads/{token}?sig=signature-{token}"})

    def _CreateSubmission(self, given: dict[str, Any]) -> Answer:
        if self.allowed < 1:
            return refusal(400, "Submission not allowed: you have used all of today's submissions")
        token = given["blobFileTokens"]
        assert len(self.uploads[token]) == self.upload_sizes[token], "submitted before it was uploaded"
        self.allowed -= 1
        reference = 1000 + len(self.submissions)
        self.submissions.insert(
            0,
            {
                "ref": reference,
                "fileName": "submission.csv.gz",
                "date": "2026-11-21T00:00:00Z",
                "description": given.get("submissionDescription", ""),
                "_token": token,
            },
        )
        return found({"message": "Successfully submitted", "ref": reference})

    def _ListSubmissions(self, given: dict[str, Any]) -> Answer:
        return self._page(given, "submissions", [self._shown(item) for item in self.submissions])

    def _GetSubmission(self, given: dict[str, Any]) -> Answer:
        item = next((item for item in self.submissions if item["ref"] == given["ref"]), None)
        if item is None:
            return refusal(404, "Not found")
        polls = self.polls[item["ref"]] = self.polls.get(item["ref"], 0) + 1
        if polls > self.scored_after and "status" not in item:
            self.score(item)
        return found(self._shown(item))

    def _GetSubmissionLimits(self, given: dict[str, Any]) -> Answer:
        made = len(self.submissions)
        left = {"numAllowedNow": self.allowed} if self.allowed else {}
        return found({"numToday": made, "numTotal": made, "limitedByTotal": self.limited_by_total, **left})

    def _GetLeaderboard(self, given: dict[str, Any]) -> Answer:
        return self._page(given, "submissions", [{"teamName": team, "score": score} for team, score in self.board])

    def score(self, item: dict[str, Any]) -> None:
        """Score a submission."""
        item |= {"status": "COMPLETE", "publicScore": "0.99651", "privateScore": "0.99632"}

    def _shown(self, item: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in item.items() if not key.startswith("_")}

    def _page(self, given: dict[str, Any], name: str, items: list[dict[str, Any]]) -> Answer:
        start = int(given.get("pageToken") or 0)
        end = start + self.page_size
        following = {"nextPageToken": str(end)} if end < len(items) else {}
        return found({name: items[start:end], **following})

    # ------------------------------------------------------------ the storage

    def get(self, name: str, signature: str, headers: Any) -> Answer:
        """Return a file or a part of it."""
        if signature not in self.signed:
            return Answer(403, b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code></Error>" * 10)
        body = self.files[name]
        etag = f'"{name}-{self.version}"'
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        told = {"ETag": etag, "x-goog-hash": f"crc32c=AAAAAA==,md5={md5}", "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-", headers.get("Range", ""))
        if match and headers.get("If-Range", etag) == etag:
            start = int(match[1])
            if start >= len(body):
                return Answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return Answer(206, body[start:], {**told, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
        return Answer(200, body, told)

    def put(self, token: str, content: bytes, headers: Any) -> Answer:
        """Take a file or a part of it."""
        stored, size = self.uploads[token], self.upload_sizes[token]
        span = headers.get("Content-Range", "")
        if not span.startswith("bytes */"):
            start = int(span.split()[1].split("-")[0]) if span else 0
            assert start <= len(stored)
            stored[start:] = content
        if len(stored) == size:
            return Answer(201)
        return Answer(308, b"", {"Range": f"bytes=0-{len(stored) - 1}"} if stored else {})

    def sent(self, item: dict[str, Any]) -> bytes:
        """Return the bytes of the file that a submission is of."""
        return bytes(self.uploads[item["_token"]])


def found(content: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def refusal(code: int, message: str) -> Answer:
    content = json.dumps({"code": code, "message": message}).encode()
    return Answer(code, content, {"Content-Type": "application/json"})


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    owner: KaggleServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        method = urlsplit(self.path).path.rpartition("/")[2]
        given = json.loads(self._body())
        self._answer(
            method, lambda: self.owner.call(method, given) if self._known() else refusal(401, "Unauthenticated")
        )

    def do_GET(self) -> None:
        assert "Authorization" not in self.headers, "credentials went to the storage"
        url = urlsplit(self.path)
        self.owner.ranges.append(self.headers.get("Range"))
        signature = parse_qs(url.query)["sig"][0]
        self._answer("GET", lambda: self.owner.get(Path(url.path).name, signature, self.headers))

    def do_PUT(self) -> None:
        assert "Authorization" not in self.headers, "credentials went to the storage"
        token = Path(urlsplit(self.path).path).name
        # Read only when it is taken, so that a fault can break off before.
        self.was_read = False
        self._answer("PUT", lambda: self.owner.put(token, self._body(), self.headers))

    def _known(self) -> bool:
        kind, _, secret = self.headers.get("Authorization", "").partition(" ")
        if kind == "Bearer":
            return secret in self.owner.tokens
        user, _, key = base64.b64decode(secret).decode().partition(":") if kind == "Basic" else ("", "", "")
        return (user, key) in self.owner.keys

    def _body(self) -> bytes:
        self.was_read = True
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, call: str, make: Callable[[], Answer]) -> None:
        with self.owner.lock:
            self.owner.asked.append(call)
            faults = self.owner.faults[call]
            fault = faults.popleft() if faults else None
        answer = fault(self, make) if fault else make()
        if call == "PUT" and not self.was_read:
            self.close_connection = True  # or the next request would begin with this one's body
        if answer is None:
            self._break()
        else:
            self.send(answer)

    def send(self, answer: Answer, *, break_off: bool = True) -> None:
        self.send_response(answer.status)
        headers = dict(answer.headers)
        if answer.with_length:
            headers["Content-Length"] = str(len(answer.body))
        else:
            headers["Connection"] = "close"
            self.close_connection = True
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[: answer.body_sent])
        self.wfile.flush()
        if answer.body_sent is not None and break_off:
            time.sleep(0.1)  # or the reset would overtake the bytes
            self._break()

    def _break(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
