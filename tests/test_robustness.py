"""docs/robustness.md says what the tests say."""

from tests.robustness import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m tests.robustness writes it again"
