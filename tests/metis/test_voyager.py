import pytest

from metis.backend import BackendMissingError
from metis.voyager import Voyager


def test_without_the_sdk_every_verb_says_how_to_get_it(tmp_path):
    voyager = Voyager()
    probe = voyager.probe()
    assert not probe.available
    assert "axelera-devkit" in probe.missing
    with pytest.raises(BackendMissingError, match="not installed"):
        voyager.quantize(tmp_path, tmp_path, tmp_path, scheme="per_tensor_histogram")
    with pytest.raises(BackendMissingError, match="not installed"):
        voyager.infer(None, None)
    with pytest.raises(BackendMissingError, match="not installed"):
        voyager.compile(None, tmp_path, aipu_cores=1)


def test_an_sdk_that_is_installed_is_found_and_not_claimed_to_be_driven(monkeypatch):
    monkeypatch.setattr("metis.voyager.version", lambda name: "1.8.0")
    probe = Voyager().probe()
    assert probe.versions == {"axelera-devkit": "1.8.0", "axelera-rt": "1.8.0"}
    assert not probe.available
    assert "does not drive the Voyager SDK yet" in probe.missing
