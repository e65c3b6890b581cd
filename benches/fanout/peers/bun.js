// Bun's own WebSocket server (uWebSockets): publish to one topic. A line with a number on standard input: so many messages.
const [port, bytes] = process.argv.slice(2).map(Number);
const text = "x".repeat(bytes);
const server = Bun.serve({
  port, hostname: "127.0.0.1",
  fetch(request, server) { if (!server.upgrade(request)) return new Response("", { status: 400 }); },
  websocket: { open(socket) { socket.subscribe("all"); }, message() {}, idleTimeout: 960, sendPings: false },
});
for await (const line of console) for (let i = 0; i < Number(line); i++) server.publish("all", text);
process.exit(0);
