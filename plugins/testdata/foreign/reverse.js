// An interceptor that turns message bodies round and marks them with an option
// flag, as a process of its own, without any Go: the control plane is gRPC, the
// data plane the frames of proto/README.md in the chunks of the stream Data.

const crypto = require('node:crypto');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const protobuf = require('protobufjs');
const protoText = require('./control.proto');

const FLAG = 0x40000;
const description = {
  kind: 'interceptor', name: 'example/reverse', version: '1.0.0', api: [1],
  handles: ['send', 'receive'], flag: FLAG, mutates: true,
  promise: 'Bodies are turned round on the wire.',
  config_schema: { type: 'object', properties: {}, additionalProperties: false },
};

// What a message becomes on its way down and up: [options, body], or null when
// it stays as it is.
function down(options, body) {
  return [(options | FLAG) >>> 0, Buffer.from(body).reverse()];
}

function up(options, body) {
  return options & FLAG ? [(options & ~FLAG) >>> 0, Buffer.from(body).reverse()] : null;
}

// Frames.

const KIND = { start: 1, stop: 2, down: 48, up: 49, verdict: 82, ping: 0xf0, pong: 0xf1 };
const REPLY = 1, EVENT = 2;
const PASS = 0, REPLACE = 1, ERROR = 4;
const REPLACE_BODY = 16;
const MAX_FRAME = (16 << 20) + (64 << 10);

function frame(seq, kind, verdict, flags, options, ...parts) {
  const head = Buffer.alloc(20);
  head.writeUInt32BE(16 + parts.reduce((n, p) => n + p.length, 0), 0);
  head.writeBigUInt64BE(seq, 4);
  head.writeUInt8(kind, 12);
  head.writeUInt8(verdict, 13);
  head.writeUInt16BE(flags, 14);
  head.writeUInt32BE(options, 16);
  return Buffer.concat([head, ...parts]);
}

// An error: its length as a varint, the text, no codes, no list of members.
function errorPayload(text) {
  const t = Buffer.from(text).subarray(0, 4096);
  const n = t.length < 128 ? [t.length] : [(t.length & 127) | 128, t.length >> 7];
  return Buffer.concat([Buffer.from(n), t, Buffer.from([0, 0])]);
}

function handle(f) {
  switch (f.kind) {
    case KIND.ping:
      return frame(0n, KIND.pong, PASS, EVENT, 0);
    case KIND.start:
      return frame(f.seq, f.kind, REPLACE, REPLY, 0, Buffer.from(JSON.stringify({ description })));
    case KIND.stop:
      return frame(f.seq, f.kind, PASS, REPLY, 0);
    case KIND.down:
    case KIND.up: {
      const body = f.payload.subarray(4 + f.payload.readUInt32BE(0));
      const out = (f.kind === KIND.down ? down : up)(f.options, body);
      if (out === null) {
        return frame(f.seq, KIND.verdict, PASS, EVENT, 0);
      }
      return frame(f.seq, KIND.verdict, REPLACE, EVENT, out[0], Buffer.from([REPLACE_BODY]), out[1]);
    }
  }
  if (f.flags & EVENT) {
    return null; // unknown events are ignored
  }
  return frame(f.seq, f.kind, ERROR, REPLY, 0, errorPayload(`call ${f.kind} is unknown`));
}

// data serves the data plane: the chunks are pieces of one stream of bytes.
function data(stream) {
  let rest = Buffer.alloc(0);
  stream.on('data', (chunk) => {
    rest = rest.length ? Buffer.concat([rest, chunk.data]) : chunk.data;
    const replies = [];
    while (rest.length >= 4) {
      const n = rest.readUInt32BE(0);
      if (n < 16 || n > MAX_FRAME) {
        stream.destroy(new Error(`a frame of ${n} bytes`));
        return;
      }
      if (rest.length < 4 + n) {
        break;
      }
      const reply = handle({
        seq: rest.readBigUInt64BE(4), kind: rest.readUInt8(12), flags: rest.readUInt16BE(14),
        options: rest.readUInt32BE(16), payload: rest.subarray(20, 4 + n),
      });
      if (reply) {
        replies.push(reply);
      }
      rest = rest.subarray(4 + n);
    }
    if (replies.length) { // what came together goes back together
      stream.write({ data: Buffer.concat(replies) });
    }
  });
  for (const end of ['end', 'error', 'cancelled']) {
    stream.on(end, () => process.exit(0)); // the node is gone
  }
}

// A certificate for mutual TLS, made for this start only: the node learns it
// from the handshake, and we trust no other than the node's.

function der(tag, ...parts) {
  const body = Buffer.concat(parts);
  const n = body.length;
  const length = n < 128 ? [n] : n < 256 ? [0x81, n] : [0x82, n >> 8, n & 255];
  return Buffer.concat([Buffer.from([tag, ...length]), body]);
}

function certificate() {
  const { privateKey, publicKey } = crypto.generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const ecdsaSHA256 = der(0x30, Buffer.from('06082a8648ce3d040302', 'hex'));
  const name = der(0x30, der(0x31, der(0x30, Buffer.from('0603550403', 'hex'), der(0x0c, Buffer.from('localhost')))));
  const time = (ms) => der(0x18, Buffer.from(new Date(ms).toISOString().replace(/[-:T]|\.\d+/g, '')));
  const san = der(0x30, Buffer.from('0603551d11', 'hex'), der(0x04, der(0x30, der(0x82, Buffer.from('localhost')))));
  const ca = der(0x30, Buffer.from('0603551d13', 'hex'), Buffer.from([1, 1, 255]), der(0x04, der(0x30, Buffer.from([1, 1, 255]))));
  const tbs = der(0x30,
    der(0xa0, Buffer.from([2, 1, 2])), der(0x02, Buffer.concat([Buffer.from([1]), crypto.randomBytes(8)])), ecdsaSHA256,
    name, der(0x30, time(Date.now() - 3600e3), time(Date.now() + 30 * 365 * 86400e3)), name,
    publicKey.export({ type: 'spki', format: 'der' }), der(0xa3, der(0x30, san, ca)));
  const signature = crypto.sign('sha256', tbs, privateKey);
  return {
    der: der(0x30, tbs, ecdsaSHA256, der(0x03, Buffer.from([0]), signature)),
    key: privateKey.export({ type: 'pkcs8', format: 'pem' }),
  };
}

function serve() {
  const json = protobuf.parse(protoText, { keepCase: true }).root.toJSON();
  const api = grpc.loadPackageDefinition(loader.fromJSON(json, { keepCase: true, defaults: true })).longhouse.plugins.v1;
  const cert = certificate();
  const pem = `-----BEGIN CERTIFICATE-----\n${cert.der.toString('base64').match(/.{1,64}/g).join('\n')}\n-----END CERTIFICATE-----\n`;
  const server = new grpc.Server({ 'grpc.max_receive_message_length': MAX_FRAME + (64 << 10) });
  server.addService(api.Control.service, {
    Configure: (call, done) => {
      const options = Buffer.from(call.request.options).toString().trim();
      if (options !== '' && options !== '{}') {
        const name = options.split(/[:\n{]/).find((part) => part.trim() !== '');
        done({ code: grpc.status.INVALID_ARGUMENT, details: `${call.request.origin}: unknown option ${name.trim()}: example/reverse has none` });
        return;
      }
      done(null, { stream: true }); // the data plane is Data
    },
    Health: (call, done) => done(null, {}),
    Stats: (call, done) => done(null, { samples: [] }),
    Stop: (call, done) => {
      done(null, {});
      setTimeout(() => process.exit(0), 10);
    },
    Data: data,
  });
  const socket = path.join(process.env.PLUGIN_UNIX_SOCKET_DIR, 'sock');
  // A node always sends a certificate; who does not gets no encryption either.
  const client = process.env.PLUGIN_CLIENT_CERT;
  const credentials = !client ? grpc.ServerCredentials.createInsecure() :
    grpc.ServerCredentials.createSsl(Buffer.from(client), [{ private_key: Buffer.from(cert.key), cert_chain: Buffer.from(pem) }], true);
  server.bindAsync(`unix:${socket}`, credentials, (err) => {
    if (err) {
      console.error(err.message);
      process.exit(1);
    }
    // The handshake: go-plugin's version, ours, where, how, and the certificate.
    process.stdout.write(`1|1|unix|${socket}|grpc|${client ? cert.der.toString('base64').replace(/=+$/, '') : ''}\n`);
  });
}

if (process.argv[2] === 'describe') {
  process.stdout.write(JSON.stringify(description) + '\n');
} else if (process.env.LONGHOUSE_PLUGIN === 'longhouse-plugin-api') {
  serve();
} else {
  console.error('This is a plugin for longhouse; a node starts it by itself. To see what it is: reverse describe');
  process.exit(1);
}
