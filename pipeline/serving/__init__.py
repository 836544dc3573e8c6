"""Nets at people's own pictures: pictures in, masks out, whatever the net, the size or the file."""
