"""YAML and JSON from outside: what they mean, and what they may cost."""

import json
import time

import pytest
import yaml

from loaders.manifest import manifest_subjects
from loaders.texts import load_yaml, read_json, read_yaml

NESTED = "[" * 100_000


def refused(text: str) -> str:
    begin = time.process_time()
    with pytest.raises(yaml.YAMLError) as caught:
        load_yaml(text)
    assert time.process_time() - begin < 5
    return str(caught.value)


def bomb(lines: int, aliases: int = 9) -> str:
    text = f"a0: &a0 [{', '.join('x' * aliases)}]\n"
    for line in range(1, lines):
        text += f"a{line}: &a{line} [{', '.join([f'*a{line - 1}'] * aliases)}]\n"
    return text


def test_what_aliases_expand_to_is_bounded_and_not_their_number():
    assert "aliases" in refused(bomb(9))
    assert "aliases" in refused(bomb(30, 2))
    many = load_yaml("base: &base [1, 2]\nall: [" + ", ".join(["*base"] * 500) + "]")
    assert many["all"] == [[1, 2]] * 500


def test_merge_keys_count_as_what_they_expand_to():
    merged = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
    )
    assert "aliases" in refused(merged)


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "[" * 5000 + "]" * 5000, "{a: " * 5000, "- " * 5000 + "x"]
    + ["a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 300))],
    ids=["open", "closed", "mappings", "dashes", "aliases"],
)
def test_deep_nesting_is_refused_in_one_line(text):
    message = refused(text)
    assert "deeper than 100" in message and "\n" not in message


def test_ninety_levels_are_read():
    assert load_yaml("[" * 90 + "]" * 90)


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}"])
def test_an_alias_inside_of_what_it_stands_for_is_refused(text):
    assert "*a" in refused(text)


def test_merge_keys_fill_in_what_is_not_written():
    text = "base: &base {lr: 1, seed: 2}\none: {<<: *base, seed: 3}\ntwo: {seed: 3, <<: *base}"
    read = load_yaml(text)
    assert read["one"] == read["two"] == {"lr": 1, "seed": 3}
    assert read["base"] == {"lr": 1, "seed": 2}


def test_of_several_merged_mappings_the_first_wins():
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, y: 2, z: 2}\nc: {<<: [*a, *b], y: 3}"
    assert load_yaml(text)["c"] == {"x": 1, "y": 3, "z": 2}


def test_a_merged_mapping_may_be_merged_again():
    text = "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, x: 3}"
    assert load_yaml(text)["c"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "{a: 1, 'a': 2}", "b: &b {x: 1}\nc: {<<: *b, x: 1, x: 2}"]
)
def test_a_key_written_twice_is_refused_beside_a_merge_too(text):
    assert "twice" in refused(text)


@pytest.mark.parametrize(
    "text", ["0x_", "1" * 5000, "!!timestamp foo", "!!bool foo", "!!int ''", "!!python/name:os.a"]
)
def test_a_value_that_its_type_does_not_know_is_refused(text):
    assert refused(f"a: {text}")


@pytest.mark.parametrize(
    "text", ["1:" * 400_000 + "1", "0x" + "f" * 5000, "!!float " + "1:" * 9999]
)
def test_a_number_that_is_too_long_to_be_one_is_refused_at_once(text):
    assert "a number of" in refused(f"a: {text}")


def test_of_more_values_than_there_may_be_the_rest_is_not_read():
    assert "values" in refused("[" + "1," * 100_000 + "}, which is no YAML")


def test_an_endless_text_is_refused_before_it_is_read():
    assert "characters" in refused("a: 1\n" * 1_000_000)


def test_words_and_numbers_are_what_people_mean():
    assert load_yaml("[off, no, 2024-01-01, 1e-3, true]") == ["off", "no", "2024-01-01", 1e-3, True]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name, read in (("a.yaml", read_yaml), ("a.json", read_json)):
        (tmp_path / name).write_text(NESTED)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
        (tmp_path / name).write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)


def test_a_manifest_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "volumes.json").write_text(NESTED)
    with pytest.raises(ValueError, match=r"volumes\.json"):
        manifest_subjects(tmp_path / "volumes.json")


def test_indices_and_summaries_that_are_nested_without_end_are_named(tmp_path):
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.reports.evaluation import write_report
    from vae3d.stage2.latents import read_index

    (tmp_path / "latents.json").write_text(NESTED)
    with pytest.raises(ValueError, match=r"latents\.json"):
        read_index(tmp_path)
    (tmp_path / "metrics.csv").write_text("case,psnr\na,1\n")
    (tmp_path / "summary.json").write_text(NESTED)
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_report(tmp_path)
    for recipe in (NESTED, json.dumps({"class_path": "x"})[:-1]):
        (tmp_path / "config.json").write_text(recipe)
        with pytest.raises(ValueError, match=r"config\.json"):
            CustomVAE.from_pretrained(tmp_path)
