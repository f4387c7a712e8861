"""`minference patterns`: the analyses of attention behind the method."""
