"""Slates: where the record of a lease lies, in a file, in etcd or in Kubernetes; read, and swapped if it stands."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import math
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import httpx

from infinillm.errors import BadRequest, Unavailable

LOOK_SECONDS = 0.005  # between two tries to lock a file
KUBERNETES_URL = "https://kubernetes.default.svc"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EPOCH = "infinillm.io/epoch"  # the annotation


@dataclass(frozen=True, slots=True)
class Record:
    """Who leads. An empty `holder` is nobody."""

    holder: str = ""
    epoch: int = 0
    seconds: float = 0.0  # that a writing is good for
    terms: int = 0  # there were


class Slate(Protocol):
    """One record that several processes share. Raises Unavailable where it cannot be reached."""

    async def read(self) -> tuple[Record, str]:
        """The record and its version, which no other writing ever has."""
        ...

    async def write(self, record: Record, version: str) -> bool:
        """Write if that version still stands. After an error it may have been written or not."""
        ...

    async def close(self) -> None: ...


def _record(plain: Any, where: str) -> Record:
    try:
        return Record(str(plain["holder"]), int(plain["epoch"]), float(plain["seconds"]), int(plain["terms"]))
    except (KeyError, TypeError, ValueError):
        raise Unavailable(f"{where} holds no lease of ours") from None


# --- a file -------------------------------------------------------------------------------------------------------


class FileSlate:
    """A file of JSON, for controllers on one machine or one shared disk; `PATH.lock` beside it is locked to write."""

    def __init__(self, path: str, patience: float):
        self.path, self.patience = Path(path), patience
        if not self.path.is_absolute() or not self.path.parent.is_dir() or self.path.is_dir():
            raise BadRequest(f"--lease file:{path} must be an absolute path in a folder that exists", field="lease")

    async def read(self) -> tuple[Record, str]:
        return await asyncio.to_thread(self._read)

    async def write(self, record: Record, version: str) -> bool:
        return await asyncio.to_thread(self._write, record, version)

    async def close(self) -> None:
        pass

    def _read(self) -> tuple[Record, str]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return Record(), ""
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self.path}: {error}") from None
        try:
            plain = json.loads(text)
        except ValueError:
            plain = None
        record = _record(plain, str(self.path))
        return record, str(plain.get("written", ""))

    def _write(self, record: Record, version: str) -> bool:
        written = f"{time.time_ns()}-{os.getpid()}"
        new = self.path.with_name(f"{self.path.name}.{written}")
        try:
            try:
                with new.open("x", encoding="utf-8") as out:
                    out.write(json.dumps({**asdict(record), "written": written}) + "\n")
                    out.flush()
                    os.fsync(out.fileno())
                return self._swap(new, version)
            finally:
                new.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"{self.path}: {error}") from None

    def _swap(self, new: Path, version: str) -> bool:
        """All that is done under the lock, so that who is stopped in here is an accident of microseconds."""
        deadline = time.monotonic() + self.patience
        with self.path.with_name(f"{self.path.name}.lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Unavailable(f"{lock.name} is locked by another process") from None
                    time.sleep(LOOK_SECONDS)
            if self._read()[1] != version:
                return False
            new.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True


# --- etcd ---------------------------------------------------------------------------------------------------------


class EtcdSlate:
    """A key of etcd (3.4 or later), through its JSON gateway; an endpoint that fails is followed by the next one."""

    def __init__(self, endpoints: Sequence[str], key: str, patience: float):
        self.endpoints, self.key = list(endpoints), base64.b64encode(key.encode()).decode()
        self.name = f"etcd key {key!r}"
        self._http = httpx.AsyncClient(timeout=patience, trust_env=False)

    async def read(self) -> tuple[Record, str]:
        found = (await self._ask("range", {"key": self.key})).get("kvs")
        if not found:
            return Record(), "0"
        try:
            plain = json.loads(base64.b64decode(found[0].get("value", "")))
        except ValueError:
            plain = None
        return _record(plain, self.name), str(found[0]["mod_revision"])

    async def write(self, record: Record, version: str) -> bool:
        value = base64.b64encode(json.dumps(asdict(record)).encode()).decode()
        stands = {"key": self.key, "target": "MOD", "result": "EQUAL", "mod_revision": version}
        put = {"request_put": {"key": self.key, "value": value}}
        return bool((await self._ask("txn", {"compare": [stands], "success": [put]})).get("succeeded"))

    async def close(self) -> None:
        await self._http.aclose()

    async def _ask(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        failed = ""
        for _ in range(len(self.endpoints)):
            try:
                reply = await self._http.post(f"http://{self.endpoints[0]}/v3/kv/{what}", json=body)
                if reply.status_code == httpx.codes.OK:
                    return dict(reply.json())
                failed = f"{self.endpoints[0]}: {reply.text.strip()[:200]}"
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                failed = f"{self.endpoints[0]}: {error!r}"
            self.endpoints.append(self.endpoints.pop(0))
            if what == "txn":
                break  # it may have been heard: whoever asks reads again first
        raise Unavailable(f"{self.name}: {failed}")


# --- Kubernetes ---------------------------------------------------------------------------------------------------


class KubernetesSlate:
    """A Lease of Kubernetes. What its fields cannot hold, the epoch, is an annotation.

    The pod's service account must be allowed to get, create and patch it. Its token is read each time: it changes.
    """

    def __init__(
        self, namespace: str, name: str, patience: float, url: str = KUBERNETES_URL, account: Path = SERVICE_ACCOUNT
    ):
        self.name, self.account = name, account
        self.all = f"{url}/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        ca = account / "ca.crt"
        trusted = ssl.create_default_context(cafile=str(ca)) if ca.exists() else True
        self._http = httpx.AsyncClient(timeout=patience, trust_env=False, verify=trusted)
        self.began: tuple[int, str] = (0, "")  # the epoch we wrote last, and since when

    async def read(self) -> tuple[Record, str]:
        reply = await self._ask("GET", f"{self.all}/{self.name}", None)
        if reply.status_code == httpx.codes.NOT_FOUND:
            return Record(), ""
        found = self._told(reply)
        spec, notes = found.get("spec") or {}, found["metadata"].get("annotations") or {}
        plain = {
            "holder": spec.get("holderIdentity") or "",
            "epoch": notes.get(EPOCH, 0),
            "seconds": spec.get("leaseDurationSeconds") or 0,
            "terms": spec.get("leaseTransitions") or 0,
        }
        return _record(plain, f"Lease {self.name}"), str(found["metadata"]["resourceVersion"])

    async def write(self, record: Record, version: str) -> bool:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if self.began[0] != record.epoch:
            self.began = (record.epoch, now)
        spec = {
            "holderIdentity": record.holder or None,
            "leaseDurationSeconds": math.ceil(record.seconds),
            "acquireTime": self.began[1],
            "renewTime": now,
            "leaseTransitions": record.terms,
        }
        about: dict[str, Any] = {"name": self.name, "annotations": {EPOCH: str(record.epoch)}}
        lease: dict[str, Any] = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": about,
            "spec": spec,
        }
        if version:
            about["resourceVersion"] = version
            reply = await self._ask("PATCH", f"{self.all}/{self.name}", lease)
        else:
            reply = await self._ask("POST", self.all, lease)
        if reply.status_code in {httpx.codes.CONFLICT, httpx.codes.NOT_FOUND}:
            return False
        self._told(reply)
        return True

    async def close(self) -> None:
        await self._http.aclose()

    async def _ask(self, method: str, url: str, body: dict[str, Any] | None) -> httpx.Response:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        try:
            token = (self.account / "token").read_text(encoding="utf-8").strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
            return await self._http.request(method, url, content=json.dumps(body) if body else None, headers=headers)
        except (OSError, httpx.HTTPError) as error:
            raise Unavailable(f"Lease {self.name}: {error!r}") from None

    def _told(self, reply: httpx.Response) -> dict[str, Any]:
        try:
            found = reply.json()
            if reply.is_success and found["metadata"]["resourceVersion"]:
                return dict(found)
        except (ValueError, KeyError, TypeError):
            pass
        raise Unavailable(f"Lease {self.name}: {reply.status_code} {reply.text.strip()[:200]}")
