"""Cohorts as other projects list them, with targets and folds: CLAM, PORPOISE, SurvPath, MMP, Patho-Bench, STAMP."""

from ds_wsi.bags.projects.cells import Asked, ProjectCohort
from ds_wsi.bags.projects.readers import PROJECTS, read_project
from ds_wsi.bags.projects.write import write_cohorts

__all__ = ["PROJECTS", "Asked", "ProjectCohort", "read_project", "write_cohorts"]
