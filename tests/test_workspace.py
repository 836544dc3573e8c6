"""The digest of a net's folder, and the true masks."""

import codecs
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import workspace
from pipeline.config import InputSettings
from pipeline.errors import CarvanaError
from pipeline.models import networks, weights
from tests.fakes.tiny_nets import SMALL, TINY


class TestNetDigest:
    def test_files_are_named_as_nets_name_them(self) -> None:
        assert (workspace.CONFIG, workspace.WEIGHTS) == (workspace.CONFIG, workspace.WEIGHTS)

    def test_net_digest_depends_on_architecture_and_weights(self, net_folder: Path) -> None:
        digests = {workspace.net_digest(net_folder, "last")}
        weights.save_config(net_folder, TINY, InputSettings(size=(32, 64)), {})
        digests.add(workspace.net_digest(net_folder, "last"))
        weights.save_weights(
            net_folder / workspace.WEIGHTS["last"], networks.build_model(TINY, SMALL, seed=6).state_dict()
        )
        digests.add(workspace.net_digest(net_folder, "last"))
        assert len(digests) == 3
        with pytest.raises(CarvanaError, match="trained"):
            workspace.net_digest(net_folder, "best")


class TestTruth:
    @pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda text: codecs.BOM_UTF8 + text])
    def test_it_is_known_if_it_has_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        workspace.TRUTH_FILE.parent.mkdir()
        workspace.TRUTH_FILE.write_bytes(pack(b"img,rle_mask\n"))
        assert workspace.truth_path() is None
        workspace.TRUTH_FILE.write_bytes(pack(b"img,rle_mask\n00087a6bd4dc_01.jpg,1 1\n"))
        assert workspace.truth_path() == workspace.TRUTH_FILE
