"""`minference visited`: what the lines of real heads make attention visit."""
