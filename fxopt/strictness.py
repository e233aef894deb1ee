"""What `strict=True` raises: the first failed proof of a report, known form not rewritten, or region not captured."""

from __future__ import annotations

from fxopt.errors import ProofError, UnmatchedError
from fxopt.report.records import MismatchRecord, Report, Site

CURE = "strict=False reports it and goes on"


def check_strictly(report: Report) -> None:
    """Check that every region of `report` was captured, every proof passed, and every site was rewritten.

    Raises:
        ProofError: a proof failed, at a site, at none or of a form of the user's own.
        UnmatchedError: anything else.
    """
    for region in report.regions:
        if region.reason:
            raise UnmatchedError(
                f"{region.module or 'the model'}: expected a captured {region.kind}, it stays stock: {region.reason}\n"
                f"{CURE}"
            )
    for miss in report.mismatches:
        if miss.proof is not None and not miss.proof.passed:
            raise ProofError(
                f"{miss.pattern}: the proof failed, {miss.proof.reason}\n{_place_of(miss)}\n{CURE}"
            )
    for site in report.sites:
        where = _place_of(site)
        if site.status == "refused" and site.proof is not None and not site.proof.passed:
            raise ProofError(f"{site.pattern}: the proof failed, {site.reason}\n{where}\n{CURE}")
        if site.status != "rewritten":
            raise UnmatchedError(
                f"{site.pattern}: expected every known form rewritten, this one was {site.status}: {site.reason}\n"
                f"{where}\n{CURE}"
            )


def _place_of(found: Site | MismatchRecord) -> str:
    return f"at {found.module or '(the model itself)'}" + (f" ({found.location})" if found.location else "")
