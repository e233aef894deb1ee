"""What `strict=True` raises: the first known form of a report that was not rewritten, or region not captured."""

from __future__ import annotations

from fxopt.errors import ProofError, UnmatchedError
from fxopt.report.records import Report


def check_strictly(report: Report) -> None:
    """Check that every region of `report` was captured, and every site rewritten.

    Raises:
        ProofError: the proof of one failed.
        UnmatchedError: anything else.
    """
    for region in report.regions:
        if region.reason:
            raise UnmatchedError(
                f"{region.module or 'the model'}: expected a captured {region.kind}, it stays stock: {region.reason}\n"
                "strict=False reports it and goes on"
            )
    for site in report.sites:
        where = f"at {site.module or '(the model itself)'}" + (f" ({site.location})" if site.location else "")
        if site.status == "refused" and site.proof is not None and not site.proof.passed:
            raise ProofError(
                f"{site.pattern}: the proof failed, {site.reason}\n{where}\n"
                f"disable=({site.pattern!r},) leaves these sites stock"
            )
        if site.status != "rewritten":
            raise UnmatchedError(
                f"{site.pattern}: expected every known form rewritten, this one was {site.status}: {site.reason}\n"
                f"{where}\nstrict=False reports it and goes on"
            )
