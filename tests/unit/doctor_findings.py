"""What a finding of `ds-wsi doctor` must be."""

from ds_wsi.doctor.finding import PASS


def assert_is(finding, status, found, remedy):
    assert finding.status == status
    assert found in finding.found, finding
    assert remedy in finding.remedy, finding
    assert bool(finding.remedy) == (status != PASS)
