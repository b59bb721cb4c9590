"""Plans for bundles that tests put together: the documents of version 0.1.0 as this version writes them."""

import json
from pathlib import Path

from exporter.foundation.quantities import from_json
from exporter.planning.plan import Plan
from exporter.report.data import Report, to_json

SPENDS = {"calibration_windows": 27, "prediction_windows": 8, "sweeps": 2, "propagates_errors": True}


def with_plan(folder: Path) -> None:
    """Bring the report in a folder to this version's schema, and write a plan beside it that agrees."""
    facts = json.loads((folder / "report.json").read_text("utf-8"))
    rows = []
    for row in facts["tensors"]:
        output_error = row.pop("weight_error", row.get("output_error"))
        kl = {"calibration_kl": 1e-3, "evaluation_kl": 2e-3}
        rows.append(row | kl | {"output_error": output_error})
    report = from_json(Report, json.dumps(facts | {"schema_version": 2, "tensors": rows}), folder)
    recipe = report.recipe
    plan = {
        "model_digest": report.model.digest,
        "device": report.device,
        "device_digest": "0" * 64,
        "target": report.target,
        "recipe": {
            "name": None, "title": "a test's", "steps": [{"method": "named-type"}], "effort": recipe.effort,
            "spends": SPENDS,
        },
        "seed": recipe.seed,
        "window": recipe.context,
        "context": 512,
        "calibration": recipe.calibration.model_dump(),
        "evaluation": recipe.evaluation.model_dump(),
        "evaluation_windows": 6,
        "matrices": [
            {key: row[key] for key in ("name", "format", "method", "reason", "calibration_kl", "evaluation_kl")}
            for row in rows
        ],
        "notes": list(recipe.remarks),
    }  # fmt: skip
    (folder / "report.json").write_text(to_json(report), "utf-8")
    (folder / "plan.json").write_text(to_json(from_json(Plan, json.dumps(plan), folder)), "utf-8")
