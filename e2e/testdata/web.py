"""A web server for the tests of ports: HTTP/1.1, WebSocket, server-sent events and raw TCP,
with nothing but Python's own library. web.py HOST PORT RAWPORT"""
import base64, hashlib, http.server, json, os, socket, socketserver, sys, threading, time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        """The size and hash of a body, with a length or in chunks."""
        size, sum = 0, hashlib.sha256()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while n := int(self.rfile.readline().strip() or b"0", 16):
                data = self.rfile.read(n)
                size += len(data)
                sum.update(data)
                self.rfile.readline()
            self.rfile.readline()
            return size, sum.hexdigest()
        left = int(self.headers.get("Content-Length", 0))
        while left > 0:
            data = self.rfile.read(min(left, 1 << 20))
            if not data:
                raise ConnectionError("the body ended early")
            left -= len(data)
            size += len(data)
            sum.update(data)
        return size, sum.hexdigest()

    def any(self):
        path, _, query = self.path.partition("?")
        if self.headers.get("Upgrade") == "websocket":
            return self.websocket()
        if path == "/page":
            return self.page(query)
        if path == "/events":
            return self.events(int(query or 1 << 30))
        if path == "/big":
            return self.big(int(query))
        if path == "/slow":
            open("/tmp/slow-began", "w").close()
            time.sleep(float(query))
        size, sum = self.body()
        self.answer(json.dumps({"method": self.command, "path": self.path, "headers": self.headers.items(), "size": size, "sha256": sum}).encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = any

    def page(self, name):
        """Answers with the head and body that /tmp/NAME.json has."""
        page = json.load(open("/tmp/%s.json" % name))
        self.send_response(200)
        for header in page["headers"]:
            self.send_header(*header)
        body = page["body"].encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def big(self, size):
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        block = bytes(range(256)) * 4096
        try:
            while size > 0:
                self.wfile.write(block[:size])
                size -= len(block)
        except OSError:
            open("/tmp/big-broken", "w").close()
            raise

    def events(self, count):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for n in range(count):
                self.wfile.write(b"data: %d\n\n" % n)
                time.sleep(0.05)
        except OSError:
            open("/tmp/events-left", "w").close()

    def websocket(self):
        """Echoes each message in capitals until it is closed."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while True:
            head = self.rfile.read(2)
            if len(head) < 2:
                open("/tmp/websocket-left", "w").close()
                return
            size, mask = head[1] & 127, b"\0" * 4
            if size == 126:
                size = int.from_bytes(self.rfile.read(2), "big")
            elif size == 127:
                size = int.from_bytes(self.rfile.read(8), "big")
            if head[1] & 128:
                mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(size))).upper()
            length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
            self.wfile.write(bytes([head[0]]) + length + data)
            if head[0] & 15 == 8:
                return


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 256


class Raw(socketserver.BaseRequestHandler):
    """Says hello, takes everything until the other half has ended, then says how much it was."""

    def handle(self):
        self.request.sendall(b"hello\n")
        size, sum = 0, hashlib.sha256()
        while data := self.request.recv(1 << 16):
            size += len(data)
            sum.update(data)
        self.request.sendall(b"%d %s\n" % (size, sum.hexdigest().encode()))


class RawServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 256


host, port, raw = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rawServer = RawServer((host, raw), Raw)
threading.Thread(target=rawServer.serve_forever, daemon=True).start()
server = Server((host, port), Handler)
open("/tmp/ready-%d" % port, "w").close()
server.serve_forever()
