"""Export trained nets to other formats and verify them."""
