"""scikit-build-core, with two questions answered first: is there a C++ compiler, and a torch?

- No working compiler: the wheel is pure Python and runs on `excessmtl_ext.reference`; the build
  says so.
- No torch in the environment pip was started from: torch becomes a build requirement. Otherwise
  it is not, so that `pip install .` neither downloads a second torch nor builds against another
  one than the ops will run with.

`-C wheel.cmake=true` (or false) answers the first question by hand: true makes a missing compiler
an error.
"""

from __future__ import annotations

import sys

from scikit_build_core import build as scikit_build
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist
from toolchain import OLDEST_TORCH, has_usable_torch, why_no_compiler

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, "list[str] | str"]

_ADVICE = """\
*** excessmtl_ext is being installed without compiled ops: {reason}.
*** It will work, slowly, on excessmtl_ext.reference. For the compiled ops install a C++20 compiler
*** (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install),
*** then pip install --force-reinstall --no-deps ."""


def _settled(settings: Settings | None, *, announce: bool = False) -> Settings:
    """The settings, with CMake switched off when no compiler works and the user did not decide."""
    settings = dict(settings or {})
    if any(key.split("skbuild.")[-1] == "wheel.cmake" for key in settings):
        return settings
    reason = why_no_compiler()
    if reason is None:
        return settings
    if announce:
        print(_ADVICE.format(reason=reason), file=sys.stderr, flush=True)
    return {**settings, "wheel.cmake": "false"}


def _torch_requirement(settings: Settings) -> list[str]:
    if settings.get("wheel.cmake") == "false" or has_usable_torch():
        return []
    return [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"]


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    settings = _settled(config_settings)
    return scikit_build.get_requires_for_build_wheel(settings) + _torch_requirement(settings)


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    settings = _settled(config_settings)
    return scikit_build.get_requires_for_build_editable(settings) + _torch_requirement(settings)


def prepare_metadata_for_build_wheel(folder: str, config_settings: Settings | None = None) -> str:
    return scikit_build.prepare_metadata_for_build_wheel(folder, _settled(config_settings))


def prepare_metadata_for_build_editable(
    folder: str, config_settings: Settings | None = None
) -> str:
    return scikit_build.prepare_metadata_for_build_editable(folder, _settled(config_settings))


def build_wheel(
    folder: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    settings = _settled(config_settings, announce=True)
    return scikit_build.build_wheel(folder, settings, metadata_directory)


def build_editable(
    folder: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    settings = _settled(config_settings, announce=True)
    return scikit_build.build_editable(folder, settings, metadata_directory)
