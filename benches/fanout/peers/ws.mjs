// ws, as its documentation broadcasts: send to every client. A line with a number on standard input: so many messages.
import { createInterface } from "node:readline";
import { WebSocketServer, WebSocket } from "ws";
const [port, bytes] = process.argv.slice(2).map(Number);
const text = "x".repeat(bytes);
const server = new WebSocketServer({ port, host: "127.0.0.1", backlog: 4096, perMessageDeflate: false });
createInterface({ input: process.stdin }).on("line", (line) => {
  for (let i = 0; i < Number(line); i++)
    for (const client of server.clients) if (client.readyState === WebSocket.OPEN) client.send(text, { binary: false });
}).on("close", () => process.exit(0));
