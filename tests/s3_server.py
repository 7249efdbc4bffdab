"""The part of S3's protocol that pyarrow's client speaks, on loopback, with objects in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase, BytesIO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Objects = dict[str, bytes]
"""By "bucket/key"."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: Objects
    buckets: set[str]
    parts: dict[tuple[str, int], bytes]

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        return unquote(url.path).strip("/"), {name: values[0] for name, values in query.items()}

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self) -> None:
        self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>not there</Message></Error>")

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = _unchunked(self.rfile)
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # S3's own chunks, with a checksum at the end, lie inside those of HTTP.
        return _unchunked(BytesIO(content)) if "aws-chunked" in self.headers.get("Content-Encoding", "") else content

    def do_HEAD(self) -> None:
        name, _ = self._asked()
        if name in self.objects:
            self._answer(200, length=str(len(self.objects[name])), ETag='"1"')
        else:
            self._answer(200 if name in self.buckets else 404)

    def do_GET(self) -> None:
        name, query = self._asked()
        if "list-type" in query:
            self._list(name, query)
        elif name not in self.objects:
            self._missing()
        else:
            content = self.objects[name]
            first, last = 0, len(content) - 1
            if "Range" in self.headers:
                begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or last), last)
            told = f"bytes {first}-{last}/{len(content)}"
            self._answer(206, content[first : last + 1], Content_Range=told, ETag='"1"')

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, cut = query.get("prefix", ""), query.get("delimiter", "")
        keys = [name.removeprefix(f"{bucket}/") for name in sorted(self.objects) if name.startswith(f"{bucket}/")]
        files, folders = [], set()
        for key in keys:
            if not key.startswith(prefix):
                continue
            inner = key[len(prefix) :]
            if cut and cut in inner:
                folders.add(prefix + inner.split(cut)[0] + cut)
            else:
                size = len(self.objects[f"{bucket}/{key}"])
                files.append(f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size></Contents>")
        below = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
        count = f"<KeyCount>{len(files) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        body = f"<ListBucketResult>{count}{''.join(files)}{below}</ListBucketResult>"
        self._answer(200, body.encode(), Content_Type="application/xml")

    def do_PUT(self) -> None:
        name, query = self._asked()
        if name.split("/")[0] not in self.buckets:
            self._missing()
            return
        content = self._body()
        if "partNumber" in query:
            self.parts[query["uploadId"], int(query["partNumber"])] = content
        else:
            self.objects[name] = content
        self._answer(200, ETag='"1"')

    def do_POST(self) -> None:
        name, query = self._asked()
        self._body()
        if "uploads" in query:
            body = f"<InitiateMultipartUploadResult><UploadId>{escape(name)}</UploadId></InitiateMultipartUploadResult>"
        else:
            numbers = sorted(number for upload, number in self.parts if upload == query["uploadId"])
            self.objects[name] = b"".join(self.parts.pop((query["uploadId"], number)) for number in numbers)
            body = "<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>"
        self._answer(200, body.encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:
        self.objects.pop(self._asked()[0], None)
        self._answer(204)


def _unchunked(stream: BufferedIOBase) -> bytes:
    """`SIZE[;more] CRLF DATA CRLF` again and again, then size 0, trailers and an empty line."""
    found = b""
    while size := int(stream.readline().split(b";")[0], 16):
        found += stream.read(size)
        stream.readline()
    while stream.readline().strip():
        pass
    return found


@contextmanager
def s3_server(bucket: str) -> Iterator[tuple[str, Objects]]:
    """A server with one empty bucket: its address for AWS_ENDPOINT_URL, and what is stored."""
    objects: Objects = {}
    handler = type("Handler", (_Handler,), {"objects": objects, "buckets": {bucket}, "parts": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()
