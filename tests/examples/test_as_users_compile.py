"""Runs the tests of the CNN example as users compile: its convolutions take a tenth of the time."""

import compilation
from apart import assert_passed, run_tests


def test_the_tests_of_the_cnn_example_pass():
    environment = compilation.users_environment()
    assert_passed(run_tests("examples/test_orthogonal_cnn.py", environment=environment))
