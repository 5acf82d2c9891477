"""A real S3-compatible server (moto's) over HTTP, behind a line that can be bad: for tests of remote stores."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import boto3
from bad_line import BadLine, serving
from moto.server import ThreadedMotoServer

BUCKET = "adapters"
_numbers = itertools.count(1)


class S3Server(BadLine):
    """The line, and what is behind it. `client` goes straight to the server."""

    def __init__(self, target_url: str) -> None:
        super().__init__(target_url)
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=target_url,
            region_name="us-east-1",
            aws_access_key_id="an access key",
            aws_secret_access_key="a secret key",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def new_url(self) -> str:
        """A store of its own in the bucket."""
        return f"s3://{BUCKET}/store{next(_numbers)}"

    def environ(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "MEDLEY_STORE_ENDPOINT": self.url,
            "MEDLEY_STORE_REGION": "us-east-1",
            "MEDLEY_STORE_ACCESS_KEY": "an access key",
            "MEDLEY_STORE_SECRET_KEY": "a secret key",
        }

    def num_uploads(self) -> int:
        """Multipart uploads that are neither complete nor aborted."""
        return len(self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))


@contextlib.contextmanager
def running_s3() -> Iterator[S3Server]:
    """Serves until the block ends."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        server = S3Server(f"http://127.0.0.1:{moto.get_host_and_port()[1]}")
        with contextlib.closing(server.client), serving(server):
            yield server
    finally:
        moto.stop()
