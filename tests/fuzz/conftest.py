"""How many cases: few and always the same ones in `make test`, 2,000 a test in `make sanitize`
(`--hypothesis-profile=large`)."""

from hypothesis import HealthCheck, settings

_common = settings(
    deadline=None, database=None, derandomize=True, print_blob=False, suppress_health_check=list(HealthCheck)
)
settings.register_profile("small", _common, max_examples=8)
settings.register_profile("large", _common, max_examples=2000)
settings.load_profile("small")
