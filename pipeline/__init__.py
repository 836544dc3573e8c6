"""Carvana image masking, from the competition's zips to a submission CSV."""
