"""Malformed requests against `triptych serve`: each must be answered 4xx, soon.

    .venv/bin/python benchmarks/serve_fuzz.py URL [--requests 5000] [--seed 0]

URL is what the server's first log line tells. Headers, JSON, tensors and images are broken in turn, each in ways that leave nothing valid,
drawn by the seed. Exit code 1 when any answer was not 4xx, or did not come within 10 seconds.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import random
import socket
import struct
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from triptych.bench.script import at_least

SECONDS = 10.0
JUNK = [None, True, -1, 0, 1.5, 2**70, "", "x", [], {}, [[]], {"a": []}, "\ud800", -0.0]


class Fuzz:
    """Malformed requests for a model whose samples have `shape`."""

    def __init__(self, model: str, shape: list[int], seed: int) -> None:
        self.path, self.shape, self.random = f"/v2/models/{model}/infer", shape, random.Random(seed)
        self.count = 1
        for size in shape:
            self.count *= size

    def cases(self) -> Iterator[tuple[str, bytes]]:
        """(kind, bytes of a request), without end."""
        kinds: list[Callable[[], bytes]] = [self.header, self.document, self.tensor, self.image]
        while True:
            for kind in kinds:
                yield kind.__name__, kind()

    def header(self) -> bytes:
        """A head that is not HTTP, or tells lengths that cannot be."""
        junk = bytes(self.random.randrange(256) for _ in range(self.random.randrange(1, 40))).translate(None, b"\r\n")
        post, host = f"POST {self.path} HTTP/1.1\r\n".encode(), b"host: x\r\n"
        digits = str(self.random.randrange(3, 10**12)).encode()
        return self.random.choice(
            [
                b"\x00" + junk + b"\r\n\r\n",
                post + host + b"bad header " + junk + b"\r\n\r\n",
                post + b"content-length: 2\r\n\r\n{}",
                post + host + b"content-length: -" + digits + b"\r\n\r\n",
                post + host + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{} ",
                post + host + b"content-length: " + digits + b"x\r\n\r\n",
                post + host + b"transfer-encoding: " + self.random.choice([b"gzip", b"chunked, chunked", b"x"]) + b"\r\n\r\n",
                post + host + b"transfer-encoding: chunked\r\n\r\nzz" + digits + b"\r\n\r\n",
                post + host + b"x: " + b"a" * 2**17 + b"\r\n\r\n",
                post.replace(b"1.1", self.random.choice([b"9.9", b"x", b"1."])) + host + b"\r\n",
                b"GET /%ff%00" + str(self.random.random()).encode() + b" HTTP/1.1\r\nhost: x\r\n\r\n",
                self.random.choice([b"DELETE", b"PUT", b"PATCH", b"BREW"]) + f" {self.path} HTTP/1.1\r\nhost: x\r\n\r\n".encode(),
                post + host + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}",
                request(self.path, self.valid(), {"inference-header-content-length": self.random.choice(["-1", "x", "", "9" * 9, "1e3"])}),
            ]
        )

    def valid(self) -> bytes:
        """A request that would be answered."""
        return json.dumps({"inputs": [self.given([0] * self.count)]}).encode()

    def given(self, data: Any) -> dict[str, Any]:
        """The input of a request."""
        return {"name": "images", "datatype": "FP32", "shape": [1, *self.shape], "data": data}

    def document(self) -> bytes:
        """JSON that is none, or not a request."""
        text, at = self.valid(), self.random.randrange(1, 80)
        junk = self.random.choice(JUNK)
        bad = [
            text[:at],
            text[:at] + b"\xff" + text[at:],
            b"[" * self.random.randrange(1, 100_000),
            b'{"a":' * self.random.randrange(1, 20_000),
            json.dumps(junk).encode(),
            json.dumps({"inputs": junk}).encode(),
            json.dumps({"inputs": [junk]}).encode(),
            json.dumps({"inputs": [self.given([0] * self.count)] * self.random.randrange(2, 4)}).encode(),
            json.dumps({"inputs": [self.given([0] * self.count)], "outputs": [self.random.choice(JUNK)]}).encode(),
            json.dumps({"inputs": [self.given([0] * self.count)], "parameters": self.random.choice([1, "x", [], None])}).encode(),
            b'{"inputs": ' + b"9" * self.random.randrange(1, 6000) + b"}",
        ]
        return request(self.path, self.random.choice(bad))

    def tensor(self) -> bytes:
        """A tensor of another name, type, shape, length or range than the model's."""
        given = self.given([0.5] * self.count)
        key = self.random.choice(["name", "datatype", "shape", "data", "size", "value", "binary", "parameters"])
        if key == "size":
            given["data"] = [0] * (self.count + self.random.choice([-1, 1, 1000]))
        elif key == "value":
            given["data"][self.random.randrange(self.count)] = self.random.choice([1e39, -(10**400), "1", None, [1], {}])
        elif key == "binary":
            return self.binary()
        elif key == "parameters":
            given["parameters"] = self.random.choice([1, [], "x", {"binary_data_size": 4}, {"shared_memory_region": "x"}])
        elif key == "shape":
            given["shape"] = self.random.choice(
                [*JUNK, [0, *self.shape], [10**9, *self.shape], [-1, *self.shape], self.shape, [True, *self.shape]]
            )
        else:
            given[key] = self.random.choice(JUNK)
        return request(self.path, json.dumps({"inputs": [given]}).encode())

    def binary(self) -> bytes:
        """A binary tensor of the wrong length, or with values that are not finite."""
        size, values = 4 * self.count, bytearray(4 * self.count)
        told, sent = self.random.choice([(size - 4, values), (size, values[:-1]), (size, values + b"x"), (size, None), ("x", values)])
        if sent is None:
            at = 4 * self.random.randrange(self.count)
            values[at : at + 4] = struct.pack("<f", self.random.choice([float("nan"), float("inf")]))
        given = {key: value for key, value in self.given(None).items() if key != "data"} | {"parameters": {"binary_data_size": told}}
        head = json.dumps({"inputs": [given]}).encode()
        body = head + bytes(values if sent is None else sent)
        return request(self.path, body, {"inference-header-content-length": str(len(head))})

    def image(self) -> bytes:
        """A file that is no image, or a damaged, huge or absurd one."""
        file = io.BytesIO()
        kind = self.random.choice(["JPEG", "PNG"])
        Image.frombytes("RGB", (40, 30), self.random.randbytes(3600)).save(file, kind)
        whole = file.getvalue()
        flipped = bytearray(whole)
        flipped[self.random.randrange(0, 3)] ^= 1 << self.random.randrange(8)
        cut = whole[: self.random.randrange(0, len(whole) * 3 // 4)]
        bad = [cut, bytes(flipped), self.random.randbytes(self.random.randrange(5000)), b"GIF89a" + whole, header_only(60_000, 60_000)]
        bad += [header_only(0, 5), header_only(20_000, 2), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"]
        return request("/predict", self.random.choice(bad))


def header_only(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def request(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a POST."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: x",
        f"content-length: {len(body)}",
        *(f"{key}: {value}" for key, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status(host: str, port: int, sent: bytes, seconds: float = SECONDS) -> str:
    """The status of the answer to these bytes: three digits, `hangs`, or `closed` when there was none."""
    answer = b""
    with socket.create_connection((host, port), seconds) as connection:
        try:
            connection.sendall(sent)
            while len(answer) < 12 and (more := connection.recv(4096)):
                answer += more
        except TimeoutError:
            return "hangs"
        except ConnectionError:
            pass  # the server may answer and close before everything was sent
    return answer[9:12].decode() if answer.startswith(b"HTTP/1.") else "closed"


def run(host: str, port: int, fuzz: Fuzz, requests: int) -> tuple[collections.Counter[tuple[str, str]], list[tuple[str, str, bytes]]]:
    """Counts by kind and status; and what was not answered 4xx: kind, status, the request."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong = []
    for _, (kind, sent) in zip(range(requests), fuzz.cases(), strict=False):
        found = status(host, port, sent)
        counts[kind, found] += 1
        if not (found.isdigit() and found.startswith("4")):
            wrong.append((kind, found, sent))
    return counts, wrong


def main() -> int:
    """Send, count, tell."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("url", help="http://HOST:PORT of a running server.")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--requests", type=at_least(1), default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with urllib.request.urlopen(f"{given.url}/v2/models/{given.model}", timeout=SECONDS) as answer:
        shape = json.load(answer)["inputs"][0]["shape"][1:]
    place = urlsplit(given.url)
    counts, wrong = run(str(place.hostname), int(place.port or 80), Fuzz(given.model, shape, given.seed), given.requests)
    for (kind, found), number in sorted(counts.items()):
        sys.stdout.write(f"{kind:<10}{found:<8}{number}\n")
    for kind, found, sent in wrong[:10]:
        sys.stdout.write(f"NOT 4xx: {kind} {found} {sent[:300]!r}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
