"""``python -m hpc_cpd`` is ``hpc-cpd``."""

from hpc_cpd.errors import explain_missing

try:
    from hpc_cpd.cli import main
except ModuleNotFoundError as error:
    explain_missing(error)
main()
