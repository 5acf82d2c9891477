"""A tenant's adapters: upload, alone or a folder of folders at once, list, show, share, delete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import msgspec

from medley.client.errors import APIError
from medley.client.transport import Transport, decode, segment
from medley.client.types import Adapter, AdapterGrant
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.revisions import revision_digest

PAGE = 1_000


class _Page(msgspec.Struct):
    adapters: list[Adapter]
    next: str | None = None


class _Grants(msgspec.Struct):
    grants: tuple[AdapterGrant, ...]


@dataclass(frozen=True)
class Upload:
    """What became of one folder: `adapter` where it is there now, `error` where it was refused or cannot be read."""

    name: str
    folder: Path
    adapter: Adapter | None
    error: APIError | OSError | None
    is_skipped: bool  # the same files were there already


class Adapters:
    """The adapters of the key's tenant."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def add(self, name: str, folder: str | Path) -> Adapter:
        """Uploads the PEFT folder as adapter `name`; the newest revision is what the name means from now on.

        Raises InvalidRequest with every reason for a refusal, FileNotFoundError where a file is missing.
        """
        config, weights = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
        with config.open("rb") as c, weights.open("rb") as w:
            files = {
                CONFIG_NAME: (CONFIG_NAME, c, "application/json"),
                WEIGHTS_NAME: (WEIGHTS_NAME, w, "application/octet-stream"),
            }
            response = self._transport.request("PUT", f"/v1/adapters/{segment(name)}", files=files)
        return decode(Adapter, response)

    def add_folder(
        self,
        folder: str | Path,
        *,
        parallel: int = 8,
        on_upload: Callable[[Upload], None] | None = None,
    ) -> list[Upload]:
        """Uploads every sub-folder that holds an adapter, under the sub-folder's name, `parallel` at a time.

        What is there already with the same files is skipped, so a call that was cut is simply made again. One
        refusal does not stop the others: look at each `Upload.error`. on_upload: called here for each as it is done.
        Raises FileNotFoundError where no sub-folder holds an adapter, Connection where the service is away.
        """
        folders = sorted(p.parent for p in Path(folder).glob(f"*/{CONFIG_NAME}"))
        if not folders:
            raise FileNotFoundError(f"no sub-folder of {folder} holds an {CONFIG_NAME}")
        present = {adapter.name: adapter for adapter in self.list()}
        uploads = []
        with ThreadPoolExecutor(max_workers=parallel) as pool:
            futures = [pool.submit(self._upload, path, present.get(path.name)) for path in folders]
            try:
                for future in as_completed(futures):
                    uploads.append(future.result())
                    if on_upload is not None:
                        on_upload(uploads[-1])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return sorted(uploads, key=lambda u: u.name)

    def _upload(self, folder: Path, present: Adapter | None) -> Upload:
        try:
            if present is not None and present.digest == _digest(folder):
                return Upload(folder.name, folder, present, None, is_skipped=True)
            return Upload(folder.name, folder, self.add(folder.name, folder), None, is_skipped=False)
        except (APIError, OSError) as error:
            return Upload(folder.name, folder, None, error, is_skipped=False)

    def list(self) -> Iterator[Adapter]:
        """Every adapter of the tenant, by name."""
        return self._pages("/v1/adapters", lambda adapter: adapter.name)

    def list_shared(self) -> Iterator[Adapter]:
        """Every adapter that other tenants share with this one; jobs name it by its `full_name`."""
        return self._pages("/v1/shared-adapters", lambda adapter: adapter.full_name)

    def _pages(self, path: str, place: Callable[[Adapter], str]) -> Iterator[Adapter]:
        after: str | None = None
        while True:
            page = self._transport.get(_Page, path, {"after": after, "limit": PAGE})
            yield from page.adapters
            if page.next is None:
                return
            after = place(page.adapters[-1])

    def get(self, name: str) -> Adapter:
        """One adapter; another tenant's, where it is shared, as `tenant/name`. Raises NotFound."""
        owner, slash, own = name.rpartition("/")
        if slash:
            return self._transport.get(Adapter, f"/v1/shared-adapters/{segment(owner)}/{segment(own)}")
        return self._transport.get(Adapter, f"/v1/adapters/{segment(name)}")

    def share(self, name: str, tenant: str, *, revision: str | None = None) -> AdapterGrant:
        """Lets another tenant use the adapter, all revisions or one. Again, it changes nothing.

        Raises NotFound for the adapter, InvalidRequest for a tenant or revision that there is not.
        """
        body = {"tenant": tenant, "revision": revision}
        return self._transport.post(AdapterGrant, f"/v1/adapters/{segment(name)}/grants", body)

    def grants(self, name: str) -> Sequence[AdapterGrant]:
        """Who may use the adapter. Raises NotFound."""
        return self._transport.get(_Grants, f"/v1/adapters/{segment(name)}/grants").grants

    def unshare(self, name: str, tenant: str, *, revision: str | None = None) -> None:
        """Ends sharing with a tenant, of everything or of one revision: its jobs that wait fail with
        `adapter_revoked`, those that run end by themselves. Raises NotFound.
        """
        params = {} if revision is None else {"revision": revision}
        path = f"/v1/adapters/{segment(name)}/grants/{segment(tenant)}"
        self._transport.request("DELETE", path, params=params)

    def delete(self, name: str) -> None:
        """Hides the adapter from new jobs; jobs that name it already run to their end. Raises NotFound."""
        self._transport.request("DELETE", f"/v1/adapters/{segment(name)}")


def _digest(folder: Path) -> str:
    with (folder / WEIGHTS_NAME).open("rb") as weights:
        return revision_digest((folder / CONFIG_NAME).read_bytes(), weights)
