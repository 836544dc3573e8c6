"""Everything that talks to Kaggle. Importing it makes no network call and prints nothing."""
