"""What a method cannot have is shown as n/a, in words apart from what was not measured; named settings in tables."""

from __future__ import annotations

from lorabench.report.results import load_results
from lorabench.report.tables import build_tables
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests.conftest import BASE
from tests.spec.test_sweep import parse

SWEEP = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
[[grid]]
label = "soft prompt"
method.name = "prompt"
[[grid]]
label = "LoRA, rank {method.rank}"
method.name = "lora"
[[table]]
rows = ["label"]
value = ["valid_loss", "merge_error", "added_decode_merged_batch_1", "spectrum.rank_90"]
name = "shown"
"""


def test_a_table_tells_what_cannot_be_from_what_is_missing(tmp_path):
    sweep, store = parse(SWEEP), Store(tmp_path)
    for spec in sweep.runs:
        record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, measures={"valid_loss": 2.0})
        if spec.method.name == "prompt":
            record.provenance = {"update": spec.method.about_update(spec), "merge_error": "not applicable: no weights"}
        store.write_spec(spec)
        store.write(record)
    sheet = next(sheet for sheet in build_tables(load_results(store, sweep)) if sheet.name == "shown")
    assert [row[:5] for row in sheet.rows] == [
        ["soft prompt", "2", "n/a", "n/a", "n/a"],
        ["LoRA, rank 8", "2", "–", "–", "–"],
    ]
    assert sheet.columns[0].label == "method"
    assert any(note.startswith("n/a: ") for note in sheet.notes)


def test_a_record_says_which_weights_the_change_counts_from():
    text = f'{BASE}method.name = "lora"\n'
    about = {}
    for key, more in {"plain": "", "qlora": 'quantization = "nf4"\n',
                      "loftq": 'quantization = "nf4"\nmethod.init = "loftq"\n'}.items():  # fmt: skip
        spec = parse(text + more).runs[0]
        about[key] = spec.method.about_update(spec)
    assert about["plain"] == "against the original weights"
    assert about["qlora"] == "against the dequantized nf4 weights"
    assert about["loftq"].startswith(about["qlora"] + " with the initial factors")
