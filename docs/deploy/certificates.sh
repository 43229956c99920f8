#!/bin/sh
# certificates.sh FOLDER: an own CA, and one certificate of it for scheduler, workers and clients.
set -eu
umask 077
mkdir -p "$1"
cd "$1"
openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj "/CN=mas_batch CA" \
    -keyout ca-key.pem -out ca.pem 2>/dev/null
openssl req -newkey rsa:3072 -nodes -subj /CN=mas_batch -keyout key.pem -out request.pem 2>/dev/null
openssl x509 -req -in request.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 90 \
    -out cert.pem 2>/dev/null
rm request.pem ca.srl
