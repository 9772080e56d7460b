"""`lorabench compare`: numbers against scipy and numpy on PEFT's own ΔW, names that differ, and what goes where."""

import json
import re

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from safetensors.torch import load_file, save_file

from lorabench.adapters.examine.comparison import compare_adapters, match_layers, mean_grid
from lorabench.adapters.examine.comparison_page import comparison_page
from lorabench.adapters.examine.comparison_text import comparison_text
from lorabench.cli import main
from lorabench.updates import formats
from tests.adapter_files import deltas, save_dense, save_lora

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two unrelated adapters of rank 3 and 5, and PEFT's own ΔW of each."""
    root = tmp_path_factory.mktemp("pair")
    return root / "a", root / "b", deltas(save_lora(root / "a", 3, seed=1)), deltas(save_lora(root / "b", 5, seed=2))


@pytest.fixture(scope="module")
def found(pair):
    return compare(*pair[:2])


def compare(a, b):
    return compare_adapters(formats.open_adapter(a), formats.open_adapter(b))


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_json_is_what_scipy_and_numpy_give_of_pefts_own_changes(pair, capsys):
    a, b, first, second = pair
    code, out, err = run(capsys, a, b, "--json")
    table = json.loads(out)
    assert code == 0 and err == "" and table["a"]["format"] == table["b"]["format"] == "peft"
    assert len(table["layers"]) == 2 * len(first) and not table["only_a"] and not table["notes"]
    for row in table["layers"]:
        W, X = (each[row["layer"]].numpy() for each in (first, second))
        if row["side"] == "input":
            W, X = W.T, X.T
        U, V = np.linalg.svd(W)[0][:, :3], np.linalg.svd(X)[0][:, :5]
        phi = [[np.square(U[:, :i].T @ V[:, :j]).sum() / min(i, j) for j in range(1, 6)] for i in range(1, 4)]
        assert np.array(row["phi"]) == pytest.approx(np.array(phi), abs=1e-5)
        angles = np.sort(scipy.linalg.subspace_angles(U, V))
        assert row["principal_angles_radians"] == pytest.approx(angles, abs=1e-5)
        assert row["grassmann"] == pytest.approx(np.linalg.norm(angles), abs=1e-5)
        share = np.linalg.norm(V.T @ W) ** 2 / np.linalg.norm(W) ** 2
        assert row["energy_of_a_in_b"] == pytest.approx(share, abs=1e-5)
        share = np.linalg.norm(U.T @ X) ** 2 / np.linalg.norm(X) ** 2
        assert row["energy_of_b_in_a"] == pytest.approx(share, abs=1e-5)
        d = len(W)
        assert row["energy_chance"] == pytest.approx({"a_in_b": 5 / d, "b_in_a": 3 / d})
        assert row["chance"][-1][-1] == pytest.approx(5 / d) and np.shape(row["chance_std"]) == (3, 5)
        assert 0 < row["energy_chance_std"]["a_in_b"] < 5 / d
        for name, shape in (("principal_angles", (3,)), ("grassmann", ())):
            mean, std, error = (np.array(row[f"{name}_chance{end}"]) for end in ("", "_std", "_error"))
            assert mean.shape == std.shape == error.shape == shape and (error > 0).all() and (error < std).all()
            assert (std < mean).all()
        assert 1e-4 <= row["p_value"] <= row["p_value_corrected"] <= 1
    adjusted = scipy.stats.false_discovery_control([row["p_value"] for row in table["layers"]])
    assert [row["p_value_corrected"] for row in table["layers"]] == pytest.approx([*adjusted])


def test_an_adapter_and_itself_rescaled(tmp_path):
    save_lora(tmp_path / "a", 3)
    save_lora(tmp_path / "b", 3, lora_alpha=100)
    table = compare(tmp_path / "a", tmp_path / "b")
    assert "100% (9.4 ± " in comparison_text(table)
    for row in table["layers"]:
        assert np.diag(row["phi"]) == pytest.approx(np.ones(3), abs=1e-4) and row["p_value"] == 1e-4
        assert row["grassmann"] < 1e-3 and row["energy_of_a_in_b"] == pytest.approx(1, abs=1e-5)


def test_a_low_rank_adapter_within_full_fine_tuning(tmp_path):
    """The dense side keeps 64 directions, and all its energy counts."""
    W = save_dense(tmp_path / "full", {LAYER: (48, 32)})[LAYER].numpy()
    first = deltas(save_lora(tmp_path / "lora", 3))[LAYER].numpy()
    table = compare(tmp_path / "lora", tmp_path / "full")
    (output,) = (row for row in table["layers"] if row["side"] == "output")
    U = np.linalg.svd(first)[0][:, :3]
    assert output["energy_of_b_in_a"] == pytest.approx(np.linalg.norm(U.T @ W) ** 2 / np.linalg.norm(W) ** 2, rel=1e-4)
    assert len(table["only_a"]) == 5 and "Only in A: model.layers.0" in comparison_text(table)


def test_names_match_by_their_longest_ending_and_say_so():
    a = ["model.layers.0.q.weight", "model.layers.1.q.weight", "head.weight"]
    b = ["layers.0.q.weight", "layers.1.q.weight", "q.weight", "head.weight"]
    matches = match_layers(a, b)
    assert matches.pairs == [("head.weight", "head.weight"), (a[0], b[0]), (a[1], b[1])]
    assert (matches.only_a, matches.only_b) == ([], ["q.weight"])
    assert matches.notes == ["2 layers are matched without the `model.` that only A's names begin with."]
    assert match_layers(b, a).notes == ["2 layers are matched without the `model.` that only B's names begin with."]


def test_a_denoiser_s_layers_match_what_kohya_calls_them():
    """Also with the pipeline's part before them, and by Flux's first names."""
    plain = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
        "mid_block.resnets.0.conv1.weight",
    ]
    kohya = [f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.weight" for name in plain]
    for names in (plain, [f"unet.{name}" for name in plain]):
        found = match_layers(names, kohya)
        assert found.pairs == [*zip(names, kohya, strict=True)] and found.only_a == found.only_b == []
        assert found.notes == [
            "2 layers are matched by the denoiser's own names of them, which one of the files writes otherwise."
        ]
    flux = match_layers(["lora_unet_double_blocks_3_img_attn_qkv[k].weight"], ["transformer_blocks.3.attn.to_k.weight"])
    assert len(flux.pairs) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (["model.layers.0.q.weight"], ["model.layers.1.q.weight"]),
        (["encoder.0.q.weight"], ["decoder.0.q.weight"]),
        (["0.q.weight"], ["encoder.0.q.weight", "decoder.0.q.weight"]),
        (["a.weight"], ["b.weight"]),
        (["layers.10.q.weight"], ["0.q.weight"]),
    ],
)
def test_names_that_could_mean_another_layer_do_not_match(a, b):
    for one, other in ((a, b), (b, a)):
        assert match_layers(one, other).pairs == [] and match_layers(one, other).only_a == one


def test_adapters_with_another_prefix_are_compared(pair, tmp_path, capsys):
    a, _, _, _ = pair
    (tmp_path / "adapter_config.json").write_text((a / "adapter_config.json").read_text())
    tensors = load_file(a / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.model.", "base_model.model."): X for name, X in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    _, out, _ = run(capsys, a, tmp_path, "--json")
    table = json.loads(out)
    assert len(table["layers"]) == 12 and table["layers"][0]["layer_b"] == "layers.0.mlp.up_proj"
    assert table["notes"] == ["6 layers are matched without the `model.` that only A's names begin with."]
    assert all(row["phi"][-1][-1] == pytest.approx(1, abs=1e-5) for row in table["layers"])


def test_other_shapes_and_unchanged_layers_are_listed(pair, tmp_path, capsys):
    save_dense(tmp_path, {LAYER: (7, 9), "model.layers.0.self_attn.q_proj": (32, 32)})
    (tmp_path / "zero").mkdir()
    save_lora(tmp_path / "zero", init_lora_weights=True)
    table = compare(pair[0], tmp_path)
    assert table["different_shapes"] == [{"layer": f"{LAYER}.weight", "a": [48, 32], "b": [7, 9]}]
    assert "Of different shapes" in comparison_text(table)
    code, out, _ = run(capsys, pair[0], tmp_path / "zero", "--html", tmp_path / "zero.html")
    assert code == 0 and "ΔW = 0 in A or B" in out and "0 compared" in out and (tmp_path / "zero.html").exists()


def test_text_is_plain_and_at_most_80_wide(pair, found, capsys):
    code, out, err = run(capsys, *pair[:2])
    assert code == 0 and err == "" and "\033" not in out
    assert max(len(line) for line in out.splitlines()[2:]) <= 80
    assert re.search(r"^q_proj +3 × 5 +0\.\d+ \(0\.16 ± 0\.0\d+\)", out, re.M) and "6 compared" in out
    assert re.sub(r"\033\[\d?m", "", comparison_text(found, bold=True)) + "\n" == out


def test_a_page_holds_all_layers_and_needs_no_other_file(pair, found, capsys, tmp_path):
    code, out, err = run(capsys, *pair[:2], "--json", "--html", tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text("utf-8")
    assert code == 0 and json.loads(out) and err == f"lorabench: wrote {tmp_path}/c.html\n"
    assert page.count("data:image/svg+xml;base64,") == 2 and not re.search(r'src="(?!data:)|<script src|<link', page)
    assert all(row["layer"] in page for row in found["layers"])
    evil = found | {"a": found["a"] | {"source": "<b>x</b>"}}
    assert "<b>x</b>" not in comparison_page(evil)


def test_an_assumed_scale_does_not_matter_and_is_mentioned(pair):
    a, b = (formats.open_adapter(folder) for folder in pair[:2])
    guessed = formats.Adapter(source="g", format="loralib", entries=b.entries, scale_source="assumed")
    assert compare_adapters(a, guessed)["notes"] == ["The scale of B is assumed; nothing here depends on it."]


def test_wrong_input_is_told_on_stderr_with_exit_code_2(pair, capsys, tmp_path):
    for arguments in [(pair[0], tmp_path), (tmp_path, pair[0])]:
        code, out, err = run(capsys, *arguments)
        assert code == 2 and out == "" and err.startswith(f"lorabench: error: {tmp_path}: holds no file of tensors")


def test_the_mean_of_grids_of_different_sizes():
    rows = [{"phi": [[1.0, 0.5]]}, {"phi": [[0.0], [0.2]]}]
    assert mean_grid(rows) == pytest.approx(np.array([[0.5, 0.5], [0.2, np.nan]]), nan_ok=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.model.layers", "model.language_model.layers"),
        ("model.layers", "model.language_model.layers"),
        ("layers", "model.language_model.layers"),
    ],
)
def test_a_text_model_that_transformers_has_moved(old, new):
    """One LoRA by both names (transformers 4.52 renamed vision-language models), and a layer that A alone has."""
    ends = ("0.self_attn.q_proj.weight", "1.self_attn.q_proj.weight")
    matches = match_layers(
        [f"{old}.{end}" for end in ends] + ["visual.q_proj.weight"], [f"{new}.{end}" for end in ends]
    )
    assert matches.pairs == [(f"{old}.{end}", f"{new}.{end}") for end in ends]
    assert matches.only_a == ["visual.q_proj.weight"] and matches.only_b == [] and len(matches.notes) == 1
