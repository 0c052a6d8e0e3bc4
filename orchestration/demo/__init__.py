"""The embedded default: real photos in, an aligned model out. A configuration and a data set."""
