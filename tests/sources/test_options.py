"""A variable that the source does not know is refused by name, with the nearest that it knows."""

import re

import pytest

from tests.support.samples import tree
from voltforge.sources import options
from voltforge.sources.options import OptionError, declared_variables
from voltforge.sources.recipe import BuildSettings, Expect, Source, SourceRecipe

CMAKE = """
option(USE_CUDNN "Use cuDNN" ON)   # option(IN_A_COMMENT "")
cmake_dependent_option(
    USE_CUDSS "Use cuDSS" ON
    "USE_CUDA" OFF)
#[[ option(IN_A_LONG_COMMENT "" ON) ]]
set(BLAS "MKL" CACHE STRING "Selected BLAS library")
set(NOT_CACHED "MKL")
if(DEFINED ENV{USE_NNPACK} OR "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "7.0")
"""
SETUP = """
# Welcome.
#
#   DEBUG
#     build with -O0, but a word like NOWHERE is none
#
#   USE_MKLDNN=0
#     disables use of MKLDNN
#
import os
VERSION = os.getenv("PYTORCH_BUILD_VERSION", 'unset')
"""
PATTERNS = ("CMakeLists.txt", "cmake/*.cmake", "setup.py")
KNOWN = (
    "USE_CUDNN", "USE_CUDSS", "BLAS", "USE_NNPACK", "TORCH_CUDA_ARCH_LIST", "DEBUG", "USE_MKLDNN",
    "PYTORCH_BUILD_VERSION", "USE_NCCL",
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    content = {
        "CMakeLists.txt": CMAKE,
        "setup.py": SETUP,
        "cmake/more.cmake": "option(USE_NCCL)",
        "doc.txt": "option(X)",
    }
    return tree(tmp_path, content)


def recipe(**env):
    source = Source(file="thing-1.0.tar.gz", sha256="ab" * 32, index="thing")
    build = BuildSettings(lock="a.txt", env=env, options=PATTERNS)
    return SourceRecipe(
        name="thing", version="1.0", source=source, build=build, expect=Expect(lock="a.txt"), path="thing.toml"
    )


def test_declarations_of_cmake_and_setup_py_are_found(source):
    found = declared_variables(source, PATTERNS)
    assert found >= set(KNOWN)
    assert not found & {"IN_A_COMMENT", "IN_A_LONG_COMMENT", "NOT_CACHED", "NOWHERE", "Welcome", "X"}


def test_declared_variables_pass(source):
    options.check_variables(recipe(**dict.fromkeys(KNOWN, "1")), source)


def test_each_unknown_variable_is_named_with_a_similar_one(source):
    with pytest.raises(OptionError) as caught:
        options.check_variables(recipe(USE_CUDNN="1", USE_CUDDS="0", USE_NCLL="1", Q="1"), source)
    assert caught.value.unknown == {"USE_CUDDS": ["USE_CUDSS"], "USE_NCLL": ["USE_NCCL"], "Q": []}
    assert re.search(r"thing.toml sets variables that thing 1\.0 does not know", caught.value.what)
    assert "USE_CUDDS, perhaps meant for USE_CUDSS" in caught.value.what


def test_recipe_without_options_is_not_checked(source):
    free = recipe(ANYTHING="1")
    options.check_variables(free.model_copy(update={"build": free.build.model_copy(update={"options": ()})}), source)
