"""A gRPC server and client of another stack (grpcio), without generated code: messages are raw bytes."""

import sys
import time
from concurrent import futures

import grpc

SERVICE = "/tombolo.test.Echo/"


class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        name = details.method.removeprefix(SERVICE)
        if name == "Unary":
            return grpc.unary_unary_rpc_method_handler(lambda request, context: request)
        if name == "Count":
            return grpc.unary_stream_rpc_method_handler(self.count)
        if name == "Chat":
            return grpc.stream_stream_rpc_method_handler(lambda requests, context: requests)
        if name == "Fail":
            return grpc.unary_unary_rpc_method_handler(self.fail)
        if name == "Sleep":
            return grpc.unary_unary_rpc_method_handler(self.sleep)
        return None

    @staticmethod
    def count(request, context):
        for number in range(int(request)):
            yield str(number).encode()

    @staticmethod
    def fail(request, context):
        context.set_trailing_metadata((("reason", "asked-for"),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as asked")

    @staticmethod
    def sleep(request, context):
        while context.is_active():
            time.sleep(0.01)
        return b""


def serve(port_file):
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with open(port_file, "w", encoding="ascii") as file:
        file.write(str(port))
    server.wait_for_termination()


def call(address):
    with grpc.insecure_channel(address) as channel:
        unary = channel.unary_unary(SERVICE + "Unary")
        deadline = time.monotonic() + 20
        while True:
            try:
                assert unary(b"hello", timeout=5) == b"hello"
                break
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        assert len(unary(b"x" * 2_000_000, timeout=10)) == 2_000_000
        print("unary ok")
        numbers = [int(item) for item in channel.unary_stream(SERVICE + "Count")(b"500", timeout=10)]
        assert numbers == list(range(500)), numbers
        print("server stream ok")
        words = [str(number).encode() for number in range(200)]
        assert list(channel.stream_stream(SERVICE + "Chat")(iter(words), timeout=10)) == words
        print("bidirectional stream ok")
        try:
            channel.unary_unary(SERVICE + "Fail")(b"", timeout=5)
            raise AssertionError("the failing call succeeded")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
            assert error.details() == "as asked", error
            assert dict(error.trailing_metadata())["reason"] == "asked-for", error
        print("status and trailers ok")
        began = time.monotonic()
        try:
            channel.unary_unary(SERVICE + "Sleep")(b"", timeout=0.5)
            raise AssertionError("the deadline did not end the call")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
        assert time.monotonic() - began < 5
        print("deadline ok")


if sys.argv[1] == "serve":
    serve(sys.argv[2])
else:
    call(sys.argv[2])
