"""Environment variables: defaults, parsing, errors that name the variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor import settings
from tersor.errors import InputError

MALFORMED = {
    "TERSOR_KERNEL": ("fused", "Reference", " auto"),
    "TERSOR_JIT_JOBS": ("0", "-2", "two", "1.5"),
}


@pytest.mark.parametrize("name", settings.SETTINGS)
@pytest.mark.parametrize("text", [None, ""])
def test_unset_or_empty_gives_the_default(name: str, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, text)
    assert settings.get(name) == settings.SETTINGS[name].default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("TERSOR_CACHE_DIR", "some/where", Path("some/where")),
        ("TERSOR_CACHE_DIR", "~/kernels", Path.home() / "kernels"),
        ("TERSOR_KERNEL", "reference", "reference"),
        ("TERSOR_KERNEL", "auto", "auto"),
        ("TERSOR_JIT_JOBS", "3", 3),
    ],
)
def test_values_are_parsed(name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    assert settings.get(name) == value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
def test_a_malformed_value_names_variable_value_and_what_is_expected(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError) as caught:
        settings.get(name)
    message = str(caught.value)
    assert name in message
    assert repr(text) in message
    assert settings.SETTINGS[name].expects in message
    assert "\n" not in message


def test_values_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_KERNEL", "reference")
    assert settings.get("TERSOR_KERNEL") == "reference"
    monkeypatch.setenv("TERSOR_KERNEL", "auto")
    assert settings.get("TERSOR_KERNEL") == "auto"


def test_an_unknown_name_is_a_programming_error() -> None:
    with pytest.raises(KeyError, match="TERSOR_KERNELS"):
        settings.get("TERSOR_KERNELS")


def test_every_setting_is_named_and_explained() -> None:
    for name, setting in settings.SETTINGS.items():
        assert name == setting.name
        assert name.startswith("TERSOR_")
        assert setting.meaning.endswith(".")
        assert setting.expects
