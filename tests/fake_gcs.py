"""Serve the JSON API of Google Cloud Storage from memory, with the conditions on generations that tensorstore needs."""

import base64
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

PAGE = 7  # names in a page of a list, few so that every client has to turn pages


class Bucket:
    """Hold objects as (bytes, generation) by name. `refused` makes requests whose names match fail with its status."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.unfinished: dict[str, bytes] = {}  # resumable uploads
        self.refused: dict[str, int] = {}
        self._generations, self._lock = itertools.count(1), threading.Lock()

    def refusal(self, name: str) -> int | None:
        return next((status for pattern, status in self.refused.items() if re.search(pattern, name)), None)

    def write(self, name: str, data: bytes, expected: str | None) -> int | None:
        """Store an object unless its generation is another than `expected`; return its generation."""
        with self._lock:
            if expected is not None and self.objects.get(name, (b"", 0))[1] != int(expected):
                return None
            self.objects[name] = (data, next(self._generations))
            return self.objects[name][1]

    def delete(self, name: str, expected: str | None) -> int:
        with self._lock:
            if name not in self.objects:
                return 404
            if expected is not None and self.objects[name][1] != int(expected):
                return 412
            del self.objects[name]
            return 204


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    buckets: dict[str, Bucket]

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if status != 204 and self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int) -> None:
        message = {404: "No such object", 412: "conditionNotMet", 403: "Forbidden", 503: "Backend Error"}
        self.answer(status, {"error": {"code": status, "message": message.get(status, "not served")}})

    def describe(self, bucket: str, name: str) -> dict:
        data, generation = self.buckets[bucket].objects[name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "etag": str(generation),
            "md5Hash": "",
            "storageClass": "STANDARD",
        }

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        path = url.path
        if path.startswith("/batch"):
            return self.batch(body)
        match = re.fullmatch(r"/(?:(upload|download)/)?(?:storage/v1/)?b/([^/]+)(/o)?(?:/(.+))?", path)
        if not match:
            return self.error(501)
        kind, bucket_name, objects, rest = match.groups()
        bucket = self.buckets.get(bucket_name)
        if bucket is None:
            return self.error(404)
        name = unquote(rest) if rest else query.get("name", "")
        if objects and (refused := bucket.refusal(name)) and self.command != "HEAD":
            return self.error(refused)
        if not objects:
            return self.bucket(bucket_name, rest)
        if kind == "upload":
            return self.upload(bucket, bucket_name, query, body)
        if copied := re.fullmatch(r"(.+)/(?:rewriteTo/b/[^/]+|moveTo)/o/(.+)", rest or ""):
            return self.copy(bucket, bucket_name, unquote(copied[1]), unquote(copied[2]), "/moveTo/" in path)
        if self.command == "DELETE":
            status = bucket.delete(name, query.get("ifGenerationMatch"))
            return self.answer(204) if status == 204 else self.error(status)
        if self.command != "GET":
            return self.error(501)
        return self.read(bucket, bucket_name, name, query) if rest else self.list(bucket, bucket_name, query)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def bucket(self, name: str, rest: str | None) -> None:
        if rest == "storageLayout":
            self.answer(200, {"kind": "storage#storageLayout", "bucket": name, "locationType": "region"})
        elif rest:
            self.error(501)
        else:
            self.answer(200, {"kind": "storage#bucket", "name": name, "id": name, "location": "US"})

    def list(self, bucket: Bucket, bucket_name: str, query: dict) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        entries: dict[str, bool] = {}
        for name in sorted(bucket.objects):
            inside = name.startswith(prefix) and name >= query.get("startOffset", "")
            if not inside or ("endOffset" in query and name >= query["endOffset"]):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                entries[prefix + head + cut] = True
                if query.get("includeTrailingDelimiter") == "true" and name == prefix + head + cut:
                    entries[name + "\0"] = False
            else:
                entries[name] = False
        names = sorted(entries)
        first = int(query.get("pageToken") or 0)
        page = names[first : first + min(PAGE, int(query.get("maxResults") or PAGE))]
        result: dict = {"kind": "storage#objects"}
        if items := [self.describe(bucket_name, n.rstrip("\0")) for n in page if not entries[n]]:
            result["items"] = items
        if prefixes := [n for n in page if entries[n]]:
            result["prefixes"] = prefixes
        if first + len(page) < len(names):
            result["nextPageToken"] = str(first + len(page))
        self.answer(200, result)

    def read(self, bucket: Bucket, bucket_name: str, name: str, query: dict) -> None:
        if name not in bucket.objects:
            return self.error(404)
        data, generation = bucket.objects[name]
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            return self.answer(304)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return self.error(412)
        if query.get("alt") != "media":
            return self.answer(200, self.describe(bucket_name, name))
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(len(data) - int(match[2]), 0)
            last = min(int(match[2]), len(data) - 1) if match[1] and match[2] else len(data) - 1
            if first >= len(data):
                return self.error(416)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(206, data[first : last + 1], **headers)
        return self.answer(200, data, **headers)

    def upload(self, bucket: Bucket, bucket_name: str, query: dict, body: bytes) -> None:
        kind, expected = query.get("uploadType"), query.get("ifGenerationMatch")
        if kind == "resumable" and "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            token = base64.urlsafe_b64encode(name.encode()).decode()
            bucket.unfinished[token] = b""
            location = f"http://{self.headers['Host']}{self.path}&upload_id={token}"
            return self.answer(200, {}, Location=location)
        if kind == "resumable":
            token = query["upload_id"]
            bucket.unfinished[token] += body
            if self.headers.get("Content-Range", "").endswith("/*"):
                return self.answer(308, Range=f"bytes=0-{len(bucket.unfinished[token]) - 1}")
            name, data = base64.urlsafe_b64decode(token).decode(), bucket.unfinished.pop(token)
        elif kind == "multipart":
            boundary = re.search(r"boundary=[\"']*([^\"';]+)", self.headers["Content-Type"])[1].encode()
            _, described, content, _ = re.split(rb"\r?\n?--" + re.escape(boundary), body)
            described, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (described, content))
            name = json.loads(described)["name"]
        else:
            name, data = query["name"], body
        if refused := bucket.refusal(name):
            return self.error(refused)
        if bucket.write(name, data, expected) is None:
            return self.error(412)
        return self.answer(200, self.describe(bucket_name, name))

    def copy(self, bucket: Bucket, bucket_name: str, source: str, target: str, moved: bool) -> None:
        if source not in bucket.objects:
            return self.error(404)
        bucket.write(target, bucket.objects[source][0], None)
        resource = self.describe(bucket_name, target)
        if moved:
            bucket.delete(source, None)
        self.answer(200, resource if moved else {"kind": "storage#rewriteResponse", "done": True, "resource": resource})

    def batch(self, body: bytes) -> None:
        """Serve a batch of deletions, as gcsfs sends them."""
        boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        parts = []
        for part in body.split(b"--" + boundary)[1:-1]:
            bucket, name = re.search(rb"DELETE /storage/v1/b/([^/]+)/o/([^ ?]+)", part).groups()
            number = re.search(rb"(?i)content-id: *<?([^>\r\n]+)", part)
            status = self.buckets[bucket.decode()].delete(unquote(name.decode()), None)
            identity = b"Content-ID: <response-" + number[1] + b">\r\n" if number else b""
            line = b"HTTP/1.1 %d %s\r\nContent-Length: 0\r\n\r\n" % (status, b"OK" if status == 204 else b"Not Found")
            parts.append(b"--batch\r\nContent-Type: application/http\r\n" + identity + b"\r\n" + line + b"\r\n")
        self.answer(200, b"".join(parts) + b"--batch--", Content_Type="multipart/mixed; boundary=batch")


class Server:
    """Serve the buckets of these names on a free local port; `environment` leads gcsfs, orbax and tensorstore to it."""

    def __init__(self, *names: str):
        self.buckets = {name: Bucket() for name in names}
        handler = type("Served", (Handler,), {"buckets": self.buckets})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client ended in the middle
        url = f"http://127.0.0.1:{self._server.server_port}"
        # The last two keep tensorstore and google.auth from asking a cloud machine's metadata for a token.
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",
        }

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
