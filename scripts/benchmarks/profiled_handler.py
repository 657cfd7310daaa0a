"""Our handler with a record of when each step of a request starts and ends, for `benchmark.py profile`.

Each worker appends a line of JSON per batch to the file that the environment variable VIVIT_PROFILE_RECORD names. Times
are seconds of time.perf_counter, which all processes of a Linux system share.
"""

import json
import os
import threading
import time

import ts.protocol.otf_message_handler
import ts.service
from vivit_handler import VivitHandler

import handler.sandbox.pool as pool_module
from handler.sandbox import DecoderPool


class ProfiledHandler(VivitHandler):
    """VivitHandler, whose steps are timed by wrapping the functions that TorchServe and the handler call."""

    def initialize(self, context):
        super().initialize(context)
        self._record = {}
        self._wrap_torchserve()
        self._wrap_decoders()

    def preprocess(self, rows):
        self._record["preprocess"] = time.perf_counter()
        return super().preprocess(rows)

    def inference(self, jobs):
        self._record["inference"] = time.perf_counter()
        jobs = super().inference(jobs)
        self._record["inferred"] = time.perf_counter()
        return jobs

    def _wrap_torchserve(self):
        receive, respond = ts.protocol.otf_message_handler._retrieve_inference_msg, ts.service.create_predict_response

        def timed_receive(connection):
            self._record = {"received": time.perf_counter()}
            return receive(connection)

        def timed_respond(result, request_ids, *arguments, **options):
            response = respond(result, request_ids, *arguments, **options)
            self._record.update(ids=list(request_ids.values()), responded=time.perf_counter())
            with open(os.environ["VIVIT_PROFILE_RECORD"], "a") as file:
                file.write(json.dumps(self._record) + "\n")
            return response

        ts.protocol.otf_message_handler._retrieve_inference_msg = timed_receive
        ts.service.create_predict_response = timed_respond

    def _wrap_decoders(self):
        load_clips, receive = DecoderPool.load_clips, pool_module.receive_message
        exchange = pool_module._DecoderProcess._exchange
        exchanges = {}  # by source: when it was sent, when it had arrived, and when the clip was received
        current = threading.local()

        def timed_load_clips(pool, sources, *arguments, **options):
            exchanges.clear()
            self._record["load"] = time.perf_counter()
            clips = load_clips(pool, sources, *arguments, **options)
            self._record["loaded"] = time.perf_counter()
            self._record["videos"] = [exchanges[id(source)] for source in sources]
            return clips

        def timed_exchange(process, source, request):
            exchanges[id(source)] = current.times_s = [time.perf_counter()]
            return exchange(process, source, request)

        def timed_receive(*arguments, **options):
            message = receive(*arguments, **options)
            if hasattr(current, "times_s"):  # not while a process starts
                current.times_s.append(time.perf_counter())
            return message

        DecoderPool.load_clips, pool_module._DecoderProcess._exchange = timed_load_clips, timed_exchange
        pool_module.receive_message = timed_receive
