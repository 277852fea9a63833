"""Tests of the mTLS lab: real openssl, real certificates, real processes, free ports."""
