"""``symgeo doctor``."""

from symgeo.cli.run import Outcome, Run


def doctor(*, run: Run) -> Outcome:
    """Versions, devices, and known traps, each with its remedy."""
    from symgeo.installation import devices, findings
    from symgeo.report import aligned, versions

    found, known = findings(), versions()
    rows = [[name, value or "not installed"] for name, value in known.items()]
    rows += [["devices", ", ".join(devices()) or "none"]]
    lines = [f"{'PROBLEM' if f.serious else 'note'}: {f.what}; {f.remedy}" for f in found]
    serious = [f for f in found if f.serious]
    text = "\n".join([aligned(["package", "version"], rows, left=2), "", *(lines or ["no known trap found"])])
    result = {"versions": known, "devices": devices(), "findings": [vars(f) for f in found], "ok": not serious}
    return Outcome(text, result, f"{serious[0].what}: {serious[0].remedy}" if serious else "")
