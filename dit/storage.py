"""The door to S3: what lies below s3://bucket/prefix, listed page by page, read until it is certain, and added to.

Endpoint, region and credentials come from the standard AWS environment (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws). What fails for the network's sake is tried again. What
arrives is believed if the server's checksum confirms it: the ETag where that is an MD5, a checksum that botocore
compares, or, where there is neither and no TLS that would have noticed, a second reading that brings the same bytes.
"""

import base64
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from dit.places import Changed, File, OutOfReach, hidden

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.2  # doubles with each attempt
PAGE_KEYS = 1000  # the most that S3 gives at once
PART_BYTES = 64 * 2**20  # of what is put there in parts: at most 10,000 of them
PUTTERS = 4  # of such parts at a time, each in memory
READERS = 32  # downloads of small objects wait for answers most of the time
MISSING = {"NoSuchKey", "404", "NotFound"}
DENIED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled"}
NOT_KNOWN = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "AuthorizationHeaderMalformed", "RequestTimeTooSkewed",
}  # fmt: skip
PASSING = {"SlowDown", "RequestTimeout", "Throttling", "BadDigest", "IncompleteBody"}
READING, WRITING = (
    "s3:ListBucket and s3:GetObject",
    "s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucketMultipartUploads",
)
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


_UNCONFIRMED = "no two answers were the same, and none was what its checksum says"


class Bucket:
    """s3://bucket/prefix as a place: the keys below the prefix, taken as a folder."""

    unsettled_ns = 0  # an ETag changes with the content, however quickly it is written twice
    readers = READERS

    def __init__(self, url: str, setting: str = "data.source"):
        """`setting` is what named it, for messages."""
        self.setting = setting
        self.bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
        self.url = f"s3://{self.bucket}/{prefix}".rstrip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        if not self.bucket:
            raise ValueError(f"{setting}: {url!r} names no bucket: give s3://bucket/prefix")
        self.lock = threading.Lock()

    @cached_property
    def client(self) -> Any:
        """One client for all threads. Raises ValueError, one line."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},  # retried here, together with what is damaged
            connect_timeout=10,
            read_timeout=30,
            max_pool_connections=READERS,
            request_checksum_calculation="when_required",
        )
        try:
            session = boto3.session.Session()
            # Times as they are written: parsing them as dates takes most of the time of listing a million keys.
            parsers = session._session.get_component("response_parser_factory")
            parsers.set_parser_defaults(timestamp_parser=lambda told: told)
            return session.client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise ValueError(f"{self.setting}: {self.url!r}: {_line(error)}: correct the AWS settings") from None

    @property
    def name(self) -> str:
        return f"{self._client().meta.endpoint_url} {self.url}"

    def _client(self) -> Any:
        with self.lock:
            return self.client

    def files(self) -> Iterator[File]:
        token: dict[str, str] = {}
        while True:
            page = self._page(token)
            for item in page.get("Contents", ()):
                name = item["Key"][len(self.prefix) :]
                if name and not name.endswith("/") and not hidden(name):
                    yield File(name, int(item["Size"]), _nanoseconds(item["LastModified"]), _etag(item))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, token: dict[str, str]) -> dict[str, Any]:
        before: dict[str, Any] | None = None

        def ask() -> dict[str, Any]:
            nonlocal before
            page = self._client().list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=PAGE_KEYS, **token)
            del page["ResponseMetadata"]
            if page == before or self._secure:  # a listing has no checksum: one that lost a key would lose an image
                return page
            before = page
            raise _Damaged(_UNCONFIRMED)

        return self._until_answered(repr(self.url), ask)

    @property
    def _secure(self) -> bool:
        return self._client().meta.endpoint_url.startswith("https://")

    def find(self, name: str) -> File | None:
        try:
            told = self._until_answered(
                f"{self.url}/{name}",
                lambda: self._client().head_object(Bucket=self.bucket, Key=self.prefix + name),
            )
        except FileNotFoundError:
            return None
        return File(name, int(told["ContentLength"]), _nanoseconds(told["LastModified"]), _etag(told))

    def read(self, file: str, start: int = 0, size: int | None = None, *, version: str = "") -> bytes:
        options = {"Bucket": self.bucket, "Key": self.prefix + file, "ChecksumMode": "ENABLED"}
        if version:
            options["IfMatch"] = f'"{version}"'
        if start or size is not None:
            if size == 0:
                return b""
            options["Range"] = f"bytes={start}-{'' if size is None else start + size - 1}"
        told = f"{self.url}/{file}"
        before: bytes | None = None

        def read() -> bytes:
            nonlocal before
            answer = self._client().get_object(**options)
            content = answer["Body"].read()
            if len(content) != answer["ContentLength"]:
                raise _Damaged(f"{len(content)} of {answer['ContentLength']} bytes came")
            if self._confirmed(answer, content, "Range" in options) or content == before:
                return content
            before = content
            raise _Damaged(_UNCONFIRMED)

        return self._until_answered(told, read)

    def _confirmed(self, answer: dict[str, Any], content: bytes, piece: bool) -> bool:
        etag = _etag(answer)
        encrypted = "aws:kms" in answer.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in answer
        if not piece and re.fullmatch(r"[0-9a-f]{32}", etag) and not encrypted:
            return hashlib.md5(content, usedforsecurity=False).hexdigest() == etag
        compared = (
            getattr(answer["Body"], "_checksum", None) is not None
        )  # botocore's body that raises where it differs
        return compared or self._secure

    def put(self, name: str, file: Path) -> None:
        """Write an object: until all of the file has arrived there is what was there before.

        Every part's MD5 goes along, so that the server refuses what was damaged on its way. Raises as Place.read does.
        """
        place, size = {"Bucket": self.bucket, "Key": self.prefix + name}, file.stat().st_size
        if size > PART_BYTES:
            return self._put_parts(name, place, file, size)
        body = file.read_bytes()
        self._write(name, lambda client: client.put_object(**place, Body=body, ContentMD5=_md5(body)))

    def _put_parts(self, name: str, place: dict[str, Any], file: Path, size: int) -> None:
        step = max(PART_BYTES, -(-size // 10_000))
        begun = self._write(name, lambda client: client.create_multipart_upload(**place))
        place = place | {"UploadId": begun["UploadId"]}

        def put(number: int) -> dict[str, Any]:
            with open(file, "rb") as opened:
                opened.seek((number - 1) * step)
                body = opened.read(step)
            part = {"PartNumber": number, "Body": body, "ContentMD5": _md5(body)}
            answer = self._write(name, lambda client: client.upload_part(**place, **part))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        pool = ThreadPoolExecutor(PUTTERS)
        try:
            parts = {"Parts": list(pool.map(put, range(1, -(-size // step) + 1)))}
            self._write(name, lambda client: client.complete_multipart_upload(**place, MultipartUpload=parts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with suppress(Exception):  # it costs money, and has no other use
                self._client().abort_multipart_upload(**place)
            raise
        pool.shutdown()

    def delete(self, name: str) -> None:
        """Delete an object, if it is there. Raises as Place.read does."""
        self._write(name, lambda client: client.delete_object(Bucket=self.bucket, Key=self.prefix + name))

    def forget_unfinished(self) -> None:
        """Let go of the parts of objects that were never put together: their writer was killed, and they cost money."""
        below = {"Bucket": self.bucket, "Prefix": self.prefix}
        found = self._write("", lambda client: client.list_multipart_uploads(**below))
        for upload in found.get("Uploads", ()):
            which = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._write("", lambda client, which=which: client.abort_multipart_upload(**which))

    def _write(self, name: str, ask: Callable[[Any], Any]) -> Any:
        return self._until_answered(f"{self.url}/{name}", lambda: ask(self._client()), writing=True)

    def _until_answered(self, told: str, ask: Callable[[], Any], *, writing: bool = False) -> Any:
        """What `ask` gives, asked again where the network or the server failed. Raises as Place.read does."""
        for attempt in range(ATTEMPTS):
            try:
                with _translated(told, self.bucket, self.setting, WRITING if writing else READING):
                    return ask()
            except _Damaged as error:
                fault = error
            if attempt + 1 < ATTEMPTS and not (attempt == 0 and str(fault) == _UNCONFIRMED):
                time.sleep(FIRST_PAUSE_SECONDS * 2**attempt * (0.5 + random.random()))
        endpoint = self._client().meta.endpoint_url
        where = "AWS_ENDPOINT_URL" if _endpoint_is_set() else "AWS_ENDPOINT_URL (not set) or AWS_REGION"
        raise OutOfReach(
            f"{self.setting}: {told} could not be {'written to' if writing else 'read from'} {endpoint} in {ATTEMPTS} attempts ({fault}); is {where} right?"
        )


class _Damaged(Exception):
    """An answer that may be better the next time."""


@contextmanager
def _translated(told: str, bucket: str, setting: str, rights: str) -> Iterator[None]:
    """botocore's errors as what a place raises; what may pass as _Damaged."""
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    head = f"{setting}: {told}"
    try:
        yield
    except boto.ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(error.response.get("Error", {}).get("Code", status))
        if code == "NoSuchBucket":
            raise ValueError(f"{head}: there is no bucket {bucket!r}: correct the name or AWS_ENDPOINT_URL") from None
        if code in MISSING:
            raise FileNotFoundError(2, "No such object", told) from None
        if code in ("PreconditionFailed", "412"):
            raise Changed(2, "The object changed", told) from None
        if code in DENIED:
            raise ValueError(f"{head}: no permission: grant {rights} to these credentials, or {CREDENTIALS}") from None
        if code in NOT_KNOWN:
            raise ValueError(f"{head}: the credentials were refused ({code}): {CREDENTIALS}") from None
        if code in ("PermanentRedirect", "301", "IllegalLocationConstraintException"):
            raise ValueError(f"{head}: the bucket lies in another region: set AWS_REGION to it") from None
        if code == "InvalidObjectState":
            raise PermissionError(13, "The object is archived (Glacier): restore it", told) from None
        if status >= 500 or status in (408, 429) or code in PASSING:
            raise _Damaged(f"{code}, status {status}") from None
        raise ValueError(f"{head}: {_line(error)}") from None
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError):
        raise ValueError(f"{head}: there are no credentials: {CREDENTIALS}") from None
    except (boto.ParamValidationError, boto.InvalidEndpointConfigurationError) as error:
        raise ValueError(f"{head}: {_line(error)}: correct it") from None
    except (boto.BotoCoreError, HTTPError, OSError) as error:  # connections that fail, stall or break off; torn XML
        raise _Damaged(f"{type(error).__name__}: {_line(error)[:200]}") from None


def _endpoint_is_set() -> bool:
    return any(name in os.environ for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def _etag(told: dict[str, Any]) -> str:
    return told.get("ETag", "").strip('"')


def _nanoseconds(told: Any) -> int:
    """2026-11-21T10:20:30.123Z of a listing, or Sat, 21 Nov 2026 10:20:30 GMT of a header, since 1970."""
    from datetime import datetime
    from email.utils import parsedate_to_datetime

    told = str(told)
    moment = datetime.fromisoformat(told) if told[:4].isdigit() else parsedate_to_datetime(told)
    return int(moment.timestamp()) * 1_000_000_000  # a header tells no fractions


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
