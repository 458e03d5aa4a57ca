"""An S3 server on a free port of the loopback interface, with one user whose signatures are checked. Says where it is in one line of JSON.

MANY=BUCKET:COUNT makes a bucket with so many objects below drop/ first.
"""

import json
import os
import threading

# The calls that make the user need no signature; every later one does.
os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "3"

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

if "MANY" in os.environ:
    bucket, count = os.environ["MANY"].split(":")
    objects = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    objects.create_bucket(bucket, "us-east-1")
    for index in range(int(count)):
        name = f"drop/{index % 10:02}/a rather long name of a document {index:06}.txt"
        objects.put_object(bucket, name, f"Words {index}.".encode())

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
_, port = server.get_host_and_port()
iam = boto3.client(
    "iam",
    endpoint_url=f"http://127.0.0.1:{port}",
    region_name="us-east-1",
    aws_access_key_id="first",
    aws_secret_access_key="first",
)
iam.create_user(UserName="tests")
everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
iam.put_user_policy(UserName="tests", PolicyName="everything", PolicyDocument=json.dumps(everything))
key = iam.create_access_key(UserName="tests")["AccessKey"]
print(
    json.dumps({"port": port, "access_key_id": key["AccessKeyId"], "secret_access_key": key["SecretAccessKey"]}),
    flush=True,
)
threading.Event().wait()
