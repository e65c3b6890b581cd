// Node's ws as a device.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import net from 'node:net'
import { Checks, assertComeBack, bodies, broadcast, drain, login, url } from './support.mjs'

const require = createRequire(process.env.CLIENTS_MODULES)
const WebSocket = require('ws')
const version = require('ws/package.json').version
const checks = new Checks('ws')
const check = checks.check.bind(checks)

/** A connection; what comes of it is kept until it is asked for. */
class Device {
  #arrived = []
  #asked = []
  pings = 0

  constructor(options = {}) {
    this.socket = new WebSocket(url, options)
    this.socket.on('message', (data, isBinary) => this.#arrive({ message: isBinary ? data : JSON.parse(data) }))
    this.socket.on('pong', data => this.#arrive({ pong: data }))
    this.socket.on('ping', () => { this.pings += 1 })
    this.socket.on('upgrade', response => { this.headers = response.headers })
    this.closed = new Promise(resolve => this.socket.on('close', (code, reason) => resolve({ code, reason: String(reason) })))
    this.closed.then(close => this.#arrive({ close }))
    this.open = new Promise((resolve, reject) => this.socket.on('open', resolve).on('error', reject))
    this.open.catch(() => {})
  }

  #arrive(event) {
    if (this.#asked.length > 0) this.#asked.shift()(event)
    else this.#arrived.push(event)
  }

  next() {
    return this.#arrived.length > 0 ? Promise.resolve(this.#arrived.shift()) : new Promise(resolve => this.#asked.push(resolve))
  }

  async welcome() {
    const { message } = await this.next()
    assert.equal(message?.type, 'welcome')
    assert.ok(message.head >= 1 && message.session.length > 0)
    return message
  }

  async closes(code) {
    assert.deepEqual(await this.next(), { close: { code, reason: '' } })
  }

  /** Is told what is wrong, and then closed. */
  async fails(code) {
    const { message } = await this.next()
    assert.equal(message?.type, 'error')
    assert.equal(message.code, 414)
    await this.closes(code)
  }

  async leave() {
    this.socket.close(1000)
    await this.closes(1000)
  }
}

async function connected(options) {
  const device = new Device(options)
  await device.open
  return device
}

async function loggedIn(since = 0, options = {}) {
  const device = await connected(options)
  device.socket.send(login(since))
  device.first = await device.welcome()
  return device
}

/** A connection whose bytes are sent a few at a time, each lot in a segment of its own. */
function inPieces(size) {
  return options => {
    const socket = net.connect({ ...options, path: undefined, noDelay: true })
    const write = socket.write.bind(socket)
    let last = Promise.resolve()
    socket.write = (data, encoding, done) => {
      const bytes = Buffer.from(data, typeof encoding === 'string' ? encoding : undefined)
      for (let at = 0; at < bytes.length; at += size) {
        last = last.then(() => new Promise(resolve => write(bytes.subarray(at, at + size), () => setTimeout(resolve, 2))))
      }
      last.then(typeof encoding === 'function' ? encoding : done)
      return true
    }
    socket.cork = socket.uncork = () => {}
    return socket
  }
}

await check('a login is welcomed', async () => (await loggedIn()).leave())

await check('permessage-deflate is offered and not negotiated', async () => {
  const device = await loggedIn(0, { perMessageDeflate: true })
  assert.equal(device.socket.extensions, '')
  assert.equal(device.headers['sec-websocket-extensions'], undefined)
  await device.leave()
})

for (const [name, body] of Object.entries(bodies)) {
  await check(`a live broadcast arrives whole: ${name}`, async () => {
    let socket
    const device = await loggedIn(0, { createConnection: options => (socket = net.connect({ ...options, path: undefined })) })
    const bytes = []
    socket.on('data', data => bytes.push(data))
    const id = await broadcast(body)
    const { message } = await device.next()
    assert.deepEqual([message.type, message.id, message.content], ['broadcast', id, body])
    const head = Buffer.concat(bytes).subarray(0, 4)
    const length = Buffer.byteLength(JSON.stringify(message))
    // A text frame with its length, in 7 bits or 16.
    assert.deepEqual([...head], length < 126 ? [0x81, length, ...Buffer.from('{"')] : [0x81, 126, length >> 8, length & 255])
    await device.leave()
  })
}

for (const payload of [Buffer.alloc(0), Buffer.from(Array.from({ length: 125 }, (_, at) => 255 - at))]) {
  await check(`a ping of ${payload.length} bytes is answered with the same`, async () => {
    const device = await loggedIn()
    device.socket.ping(payload)
    assert.deepEqual(await device.next(), { pong: payload })
    await device.leave()
  })
}

await check('a login in fragments, a ping between them', async () => {
  const device = await connected()
  const text = login()
  device.socket.send(text.slice(0, 9), { fin: false })
  device.socket.ping('between')
  device.socket.send('', { fin: false })
  device.socket.send(text.slice(9), { fin: true })
  assert.deepEqual(await device.next(), { pong: Buffer.from('between') })
  await device.welcome()
  await device.leave()
})

for (const size of [1, 7]) {
  await check(`handshake and login in segments of ${size} bytes`, async () => {
    await (await loggedIn(0, { createConnection: inPieces(size) })).leave()
  })
}

await check('a device that answers the pings stays', async () => {
  const device = await loggedIn()
  const gone = device.closed.then(({ code }) => assert.fail(`closed with ${code} after ${device.pings} pings`))
  await Promise.race([gone, new Promise(resolve => device.socket.on('ping', () => { if (device.pings === 4) resolve() }))])
  gone.catch(() => {})
  await device.leave()
})

await check('a device that answers no ping is cut off', async () => {
  const device = await loggedIn(0, { autoPong: false })
  assert.equal((await device.closed).code, 1006)
  assert.equal(device.pings, 2)
})

for (const code of [1000, 1001, 3000, 4999]) {
  await check(`a close with ${code} is answered with the same`, async () => {
    const device = await loggedIn()
    // ws sends 1001 by its lower layer only.
    if (code === 1001) device.socket._sender.close(code, '', true)
    else device.socket.close(code, 'gone, as said')
    await device.closes(code)
  })
}

await check('a close without a code is answered', async () => {
  const device = await loggedIn()
  device.socket.close()
  await device.closes(1000)
})

await check('a text after the login: error 414, close 1008', async () => {
  const device = await loggedIn()
  device.socket.send('hello')
  await device.fails(1008)
})

await check('a text that is no login: error 414, close 1008', async () => {
  const device = await connected()
  device.socket.send('x'.repeat(4096))
  await device.fails(1008)
})

const wrong = {
  'a binary login: 1003': [1003, login(), { binary: true }],
  'a login that is not masked: 1002': [1002, login(), { mask: false }],
  'a login that is not UTF-8: 1007': [1007, Buffer.from('{"type":"\xc3\x28"}', 'latin1'), { binary: false }],
  'a login of 4097 bytes: 1009': [1009, 'x'.repeat(4097), {}],
  'a login of 70,000 bytes, a frame with a 64-bit length: 1009': [1009, 'x'.repeat(70_000), {}],
}
for (const [name, [code, text, options]] of Object.entries(wrong)) {
  await check(name, async () => {
    const device = await connected()
    device.socket.send(text, options)
    await device.fails(code)
  })
}

await check('a login of 4097 bytes in two fragments: 1009', async () => {
  const device = await connected()
  device.socket.send('x'.repeat(4096), { fin: false })
  device.socket.send('x', { fin: true })
  await device.fails(1009)
})

await check('another Sec-WebSocket-Version: 426, and which one it is', async () => {
  const socket = new WebSocket(url, { protocolVersion: 8 })
  socket.on('error', () => {})
  const response = await new Promise(resolve => socket.on('unexpected-response', (_, response) => resolve(response)))
  assert.equal(response.statusCode, 426)
  assert.equal(response.headers['sec-websocket-version'], '13')
  response.destroy()
})

await check('retained broadcasts come at login, by the cursor', async () => {
  const texts = ['kept: 一', 'kept: 二']
  const ids = [await broadcast(texts[0], true), await broadcast(texts[1], true)]
  for (const [since, first] of [[0, 0], [ids[0], 1], [ids[1], 2]]) {
    const device = await loggedIn(since)
    assert.deepEqual([device.first.head, device.first.pending], [ids[1], 2 - first])
    for (let at = first; at < 2; at += 1) {
      const { message } = await device.next()
      assert.deepEqual([message.type, message.id, message.content], ['broadcast', ids[at], texts[at]])
    }
    await device.leave()
  }
})

await check('the server drains: 1012 and when to come back', async () => {
  const device = await loggedIn(Number.MAX_SAFE_INTEGER)
  drain()
  assertComeBack((await device.next()).close)
})

checks.finish(version, 28)
